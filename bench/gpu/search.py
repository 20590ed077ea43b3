"""Launches searched for the costliest kernels on this GPU: python -m bench.gpu.search FOLDER.

Each candidate is checked and timed in the whole call of a goal, in bfloat16. After each kernel
FOLDER/searched.py has rows in the form of kernels/<family>/configs.py, of those that something is
faster for; FOLDER/search.jsonl gets a record of each candidate.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from bench.gpu import goals, launches, records, trials
from bench.gpu.cases import BY_NAME, COSTLIEST, MODES
from bench.gpu.records import Record
from bench.gpu.trials import Timer
from vlmfast.kernels import launch
from vlmfast.kernels.launch import Launch, ShapeClass

MODE = MODES[-1]


class Search:
    """Candidates of kernels, recorded one by one.

    Args:
        folder: for search.jsonl and searched.py, and where ahead.jsonl is.
        device: that computes.
        timer: of a call.
        resumes: keep what the file has.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cuda",
        timer: Timer = trials.graph_timer,
        resumes: bool = False,
    ):
        self.folder = folder
        self.device = device
        self.timer = timer
        self.file = folder / "search.jsonl"
        self.records = trials.begun(self.file, resumes)
        self.skipped = launches.did_not_compile(folder / "ahead.jsonl")
        self.faster: dict[tuple[str, str], tuple[int, ShapeClass, Launch]] = {}

    def kernel(self, name: str, kernel: str) -> None:
        """All candidates of one kernel in the call of a goal, as shipped first."""
        found = goals.launched(BY_NAME[name], MODE, self.device)
        for shape, shipped in found.items():
            if shape.kernel != kernel:
                continue
            for candidate in self._worth_trying(name, kernel, shipped):
                self._try(name, kernel, candidate)
            self._conclude(name, shape, shipped)

    def _worth_trying(self, name: str, kernel: str, shipped: Launch) -> Iterator[Launch]:
        tried = {(x["goal"], x["kernel"], Launch(*x["launch"])) for x in self.records}
        near = launches.alternatives(shipped)
        for candidate in (shipped, *launches.candidates(shipped), *near):
            if (name, kernel, candidate) not in tried | self.skipped:
                yield candidate

    def _try(self, name: str, kernel: str, candidate: Launch) -> None:
        goal = BY_NAME[name]
        place: Record = {"goal": name, "kernel": kernel, "launch": candidate}
        try:
            with launch.override(**{kernel: candidate}):
                record = trials.tried(goal, MODE, goal.ours, self.device, self.timer)
        except trials.ContextLost as error:
            self._add({**place, "refused": f"out of bounds: {error}"[:300]})
            raise
        self._add({**record, **place})

    def _add(self, record: Record) -> None:
        print(record, flush=True)
        self.records.append(record)
        records.append(self.file, record)

    def _conclude(self, name: str, shape: ShapeClass, shipped: Launch) -> None:
        fastest = best(self.records, name, shape.kernel, shipped)
        if fastest is not None:
            architecture = launch.architecture(torch.device(self.device))
            self.faster[name, shape.kernel] = (architecture, shape, fastest)
        text = launches.formatted(self.faster.values())
        records.rewrite(self.folder / "searched.py", text)


def best(found: Iterable[Record], name: str, kernel: str, shipped: Launch) -> Launch | None:
    """The launch that is faster than the shipped one by more than chance, if there is one."""
    times = {
        Launch(*record["launch"]): record["median_us"]
        for record in found
        if (record["goal"], record["kernel"]) == (name, kernel) and "median_us" in record
    }
    if shipped not in times:
        return None
    fastest = min(times, key=lambda x: times[x])
    return fastest if times[fastest] < launches.GAIN * times[shipped] else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where there is nothing to search with."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.search", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(trials.RESUME, action="store_true", help="go on where a process ended")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("the search wants a GPU", file=sys.stderr)
        return 1
    search = Search(options.folder, resumes=options.resume)
    try:
        for name, kernel in COSTLIEST:
            search.kernel(name, kernel)
    except trials.ContextLost:
        trials.start_again("bench.gpu.search", arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
