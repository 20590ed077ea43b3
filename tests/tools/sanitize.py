"""The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

    make sanitize                             everything
    make sanitize SANITIZE_ARGS=address       operators' and functions' tests, under the first two
    make sanitize SANITIZE_ARGS=thread        tools/stress.py, under the third

Both builds of the extension lie in build/sanitize/; vlmfast loads them for VLMFAST_EXTENSION. First
each must report the bugs that tools/sanitize.cpp plants. Then every instruction set of this machine
takes its turn. The last lines say how many cases ran, in what time, and with how many findings;
the reports stand in build/sanitize/<build>/<instruction set>.log.

What the sanitizers do not see: masked loads and stores of AVX and AVX-512, which GCC does not
instrument; a read behind one array of a scratch buffer that ends within the next one; integers
that lose their upper half in a conversion.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = "tests/tools/sanitize.cpp"

# Memory of torch's is seen, because preloading the runtime replaces malloc; all of it is full of
# NaN. Tests of memory would measure the sanitizer, those of compilers run compilers under it.
TESTS = ["tests/test_ops_*.py", "tests/test_functional_*_*.py"]
PYTEST = ["-m", "pytest", "-q", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
PYTEST += ["--capture=sys", "-k", "not test_memory and not compile and not export"]


@dataclass(frozen=True)
class Sanitizer:
    """One build and what runs with it.

    Attributes:
        name: of its folder.
        runtime: the library that must be loaded before all others.
        compile: flags beyond those of setup.py.
        link: the same.
        options: environment variables of its runtime.
        planted: functions of tools/sanitize.cpp, and what a report says of them.
        command: arguments of Python, the last ones patterns of files.
    """

    name: str
    runtime: str
    compile: tuple[str, ...]
    link: tuple[str, ...]
    options: dict[str, str]
    planted: dict[str, str]
    command: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "sanitize" / self.name

    @property
    def library(self) -> Path:
        return self.folder / "vlmfast" / "_C.abi3.so"


SANITIZERS = {
    "address": Sanitizer(
        "address",
        "libasan.so",
        (
            "-fsanitize=address,undefined,float-cast-overflow",
            "-fno-sanitize=null,object-size,vptr",  # the first two are seen as bad addresses
            "-fsanitize-recover=address",
            # Calls in place of inline checks: GCC needs minutes for a kernel otherwise.
            "--param=asan-instrumentation-with-call-threshold=0",
            "-D_GLIBCXX_ASSERTIONS",
        ),
        ("-fsanitize=address,undefined",),
        {
            "ASAN_OPTIONS": "halt_on_error=0:detect_leaks=0:allocator_may_return_null=1"
            ":malloc_fill_byte=255:max_malloc_fill_size=33554432",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        {
            "read_behind": "heap-buffer-overflow",
            "load_vector_across_the_end": "in load_vector_across_the_end",
            "read_behind_scratch": "heap-buffer-overflow",
            "overflow_an_int": "signed integer overflow",
            "shift_too_far": "is too large for 32-bit type",
            "cast_what_is_too_large": "is outside the range of representable values",
        },
        (*PYTEST, *TESTS),
    ),
    "thread": Sanitizer(
        "thread",
        "libtsan.so",
        ("-fsanitize=thread",),
        # The extension calls the threads of tools/sanitize.cpp, not those of torch.
        ("-fsanitize=thread", "-Wl,-Bsymbolic"),
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        {"race_between_tasks": "data race", "race_out_of_turn": "data race"},
        ("-m", "tools.stress"),
    ),
}


def build(sanitizer: Sanitizer, isas: Sequence[str]) -> None:
    """Builds the extension as setup.py does, with further flags and tools/sanitize.cpp.

    Kernels for other instruction sets than `isas`, half of the work on many machines, are left
    out: their names stand for those of the first.
    """
    import setuptools  # noqa: F401  (brings distutils)
    from distutils.core import run_setup  # isort: skip

    where = [f"--build-lib={sanitizer.folder}", f"--build-temp={sanitizer.folder / 'objects'}"]
    setup = run_setup("setup.py", ["build_ext", *where], stop_after="commandline")
    (extension,) = setup.ext_modules
    extension.sources.append(SOURCE)
    extension.extra_compile_args += ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitizer.compile]
    extension.extra_link_args += sanitizer.link
    for base in (ROOT / "csrc" / "cpu").glob(f"*_{isas[0]}.cpp"):
        family = base.name.removesuffix(f"_{isas[0]}.cpp")
        for variant in base.parent.glob(f"{family}_*.cpp"):
            isa = variant.name.removeprefix(f"{family}_").removesuffix(".cpp")
            if isa not in isas:
                extension.sources.remove(str(variant.relative_to(ROOT)))
                table = f"{len(family) + 7}{family}_kernelE"
                extension.extra_link_args.append(
                    f"-Wl,--defsym=_ZN7vlmfast3cpu{len(isa)}{isa}{table}"
                    f"=_ZN7vlmfast3cpu{len(isas[0])}{isas[0]}{table}"
                )
    setup.run_commands()


def _runtime(library: str) -> str:
    """A library of the compiler's, to be loaded first."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run(sanitizer: Sanitizer, isa: str, arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """Runs Python with the build; returns its exit status, and what is then in `log`."""
    environment = {
        **os.environ,
        **sanitizer.options,
        # Without the second, the first finds no exceptions to intercept.
        "LD_PRELOAD": f"{_runtime(sanitizer.runtime)} {_runtime('libstdc++.so')}",
        "PYTHONPATH": "tests",
        "VLMFAST_EXTENSION": str(sanitizer.library),
        "VLMFAST_CPU_ISA": isa,
    }
    with log.open("w") as output:
        child = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return child.returncode, log.read_text(errors="replace")


def _findings(text: str) -> list[str]:
    """What the sanitizers report in an output, each kind and place once."""
    pattern = r"SUMMARY: (?:Address|Thread)Sanitizer: .*|\w[\w./-]*:\d+:\d+: runtime error: .*"
    return [f"{line} ({n} times)" for line, n in Counter(re.findall(pattern, text)).items()]


def missed_bugs(sanitizer: Sanitizer) -> list[str]:
    """The planted bugs that are not reported."""
    missed = []
    for function, expected in sanitizer.planted.items():
        code = (
            "import ctypes, torch; torch.set_num_threads(4); floats = torch.ones(8);"
            f"library = ctypes.CDLL({str(sanitizer.library)!r});"
            f"library.{function}(ctypes.c_void_p(floats.data_ptr()), ctypes.c_int64(8))"
        )
        _, text = _run(sanitizer, "base", ["-c", code], sanitizer.folder / f"{function}.log")
        if not any(expected in line for line in _findings(text)):
            missed.append(f"{sanitizer.name}: {function} is not reported as {expected}")
    return missed


def check(sanitizer: Sanitizer, isa: str) -> tuple[str, list[str]]:
    """Runs what the sanitizer watches; returns a line of the table, and what went wrong."""
    log, arguments = sanitizer.folder / f"{isa}.log", []
    for argument in sanitizer.command:
        arguments += sorted(glob(argument, root_dir=ROOT)) if "*" in argument else [argument]
    start = time.monotonic()
    status, text = _run(sanitizer, isa, arguments, log)
    minutes = (time.monotonic() - start) / 60
    passed = re.findall(r"(\d+) passed", text)
    cases = int(passed[-1]) if passed else 0
    wrong = _findings(text)
    line = f"{sanitizer.name:8} {isa:12} {cases:6} {minutes:8.1f} {len(wrong):9}"
    if status or not cases:
        wrong.append(f"exit status {status}; the end of {log.relative_to(ROOT)}:")
        wrong += [f"  {line}" for line in text.splitlines()[-20:]]
    return line, [f"{sanitizer.name}, {isa}: {finding}" for finding in wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="|".join(SANITIZERS))
    parser.add_argument("--build", action="store_true", help="build, and run nothing")
    options = parser.parse_args()
    if not set(options.names) <= set(SANITIZERS):
        parser.error(f"expected {' or '.join(SANITIZERS)}, got {' '.join(options.names)}")
    import torch

    import vlmfast.ops.common  # noqa: F401  (loads the extension)

    isas = torch.ops.vlmfast.cpu_isas().split(",")
    table, wrong = ["build    instructions  cases  minutes  findings"], []
    for sanitizer in (SANITIZERS[name] for name in options.names or SANITIZERS):
        build(sanitizer, isas)
        if options.build:
            continue
        wrong += missed_bugs(sanitizer)
        for isa in isas:
            line, found = check(sanitizer, isa)
            table.append(line)
            wrong += found
            print(line, *found, sep="\n", flush=True)
    print("\n".join(["", *wrong, "", *table]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
