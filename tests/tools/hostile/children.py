"""Processes that make the tries, and the count of how they ended."""

from __future__ import annotations

import json
import os
import queue
import resource
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tools.hostile.judge import shortened, tries

ROOT = Path(__file__).resolve().parents[3]
SECONDS_PER_TRY = 60
MOST_MEMORY = 2 << 30  # that a child may take for its tries: what asks for more fails at once


def run_as_child(start: int, step: int, only: str) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)  # so that tasks are divided
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything else prints is no answer
    todo = [t for t in tries(plant=only == "planted") if only in t.name]
    for index in range(start, len(todo), step):
        out.write(json.dumps({"begins": index, "name": todo[index].name}) + "\n")
        try:
            outcome = todo[index].run()
        except Exception as error:  # a fault of this page, not to be mistaken for an answer
            outcome = f"could not be judged: {type(error).__name__}: {shortened(error)}"
        out.write(json.dumps({"ends": index, "outcome": outcome}) + "\n")


class Child:
    """A process that runs every `step`-th try; after a crash another goes on behind it."""

    def __init__(self, first: int, step: int, only: str):
        self.step, self.only = step, only
        self.outcomes: dict[int, tuple[str, str]] = {}
        self._start(first)

    def _start(self, at: int) -> None:
        command = [sys.executable, "-m", "tools.hostile", "--child", str(at), str(self.step)]
        self._process = subprocess.Popen(
            [*command, "--only", self.only],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        self._begun: tuple[int, str] | None = None

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def collect(self) -> dict[int, tuple[str, str]]:
        """The names and outcomes of all its tries, once they are there."""
        while True:
            try:
                line = self._lines.get(timeout=SECONDS_PER_TRY)
            except queue.Empty:
                self._process.kill()
                why = f"hung for {SECONDS_PER_TRY} s"
            else:
                if line:
                    self._note(json.loads(line))
                    continue
                why = f"ended with {self._process.wait()}"
            if self._begun is None:
                assert why == "ended with 0", f"a child {why} between two tries"
                return self.outcomes
            index, name = self._begun
            self.outcomes[index] = name, why
            self._start(index + self.step)

    def _note(self, said: dict[str, Any]) -> None:
        if "begins" in said:
            self._begun = said["begins"], said["name"]
        else:
            self.outcomes[said["ends"]] = self._begun[1], said["outcome"]
            self._begun = None


def run(only: str = "", every: int = 1, children: int = 2) -> list[tuple[str, str]]:
    """The name and outcome of every try, or of every second, third, ..., in their order."""
    processes = [Child(every * i, every * children, only) for i in range(children)]
    outcomes = {index: both for process in processes for index, both in process.collect().items()}
    return [outcomes[index] for index in sorted(outcomes)]


GOOD = ("refused", "right", "as torch", "impossible")


def summary(outcomes: list[tuple[str, str]]) -> tuple[Counter[str], list[str]]:
    """How many tries ended how, and the findings."""
    counts = Counter(outcome if outcome in GOOD else "findings" for _, outcome in outcomes)
    counts["tried"] = len(outcomes) - counts["impossible"]
    findings = [f"{name}: {outcome}" for name, outcome in outcomes if outcome not in GOOD]
    return counts, findings
