"""Many threads on small problems, for ThreadSanitizer: `make sanitize` runs this under it.

Every case of vlmfast.verify, and one more, runs forward and backward again and again, in more
threads than there are cores, and then in several calls at once. What comes out must not change by a
bit.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from vlmfast.verify import CASES, DTYPES
from vlmfast.verify.common import Case, Tensors, run
from vlmfast.verify.flash_attention import dense_case

# Beyond those of vlmfast.verify: too few heads for the threads, so that they share the keys of one.
FEW_HEADS = dense_case("few heads", (1, 1, 33, 16), (1, 1, 800))


def _compute(case: Case, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    inputs = case.make(generator, dtype, "cpu")
    with torch.no_grad():
        outputs = case.kernel(inputs, "cpu")
    grads = {name: torch.randn(x.shape, generator=generator) for name, x in outputs.items()}
    return run(lambda inputs: case.kernel(inputs, "cpu"), inputs, case.differentiable, grads)


def _differing(problem: tuple[str, Case, torch.dtype], times: int) -> list[str]:
    """The outputs and gradients that are not the same each time."""
    family, case, dtype = problem
    first = _compute(case, dtype)
    return [
        f"{family}, {case.name}, {dtype}: {name} differs"
        for again in (_compute(case, dtype) for _ in range(times - 1))
        for name, tensor in again.items()
        if not torch.equal(tensor, first[name])
    ]


def main() -> int:
    cases = [(family, case) for family in CASES for case in CASES[family]]
    cases.append(("flash_attention", FEW_HEADS))
    problems = [(family, case, dtype) for family, case in cases for dtype in DTYPES]
    wrong, times, runs = [], 3, 0
    for threads, calls in ((2, 1), (5, 1), (2, 3)):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(calls) as pool:
            for lines in pool.map(lambda problem: _differing(problem, times), problems):
                wrong += lines
        runs += len(problems) * times
    print(*wrong, f"{runs - len(wrong)} passed", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
