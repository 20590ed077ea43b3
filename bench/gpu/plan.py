"""Steps that share a limited time: deadlines, steps in the background, logs, and one archive."""

import contextlib
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

GRACE = 6.0  # seconds that a step may take to end, once it is told to
LARGEST_FILE = 8 << 20  # bytes that the archive takes of one file
NOT_STARTED = 127


@dataclass(frozen=True)
class Step:
    """A program, and its place among the others.

    Attributes:
        name: of its log and in the summary.
        command: the command line.
        share: of the time. What one step leaves the next ones have, too.
        background: it runs beside those that follow, and has no share.
        until: names of steps that it must not run beside: the first of these stops it.
        essential: nothing is worth measuring if it fails.
        environment: added to that of this process.
    """

    name: str
    command: Sequence[str]
    share: float = 0.0
    background: bool = False
    until: Sequence[str] = ()
    essential: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """A step that was started."""

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None if it still runs after so many seconds."""
        ...

    def interrupt(self) -> None:
        """Tells it to end."""
        ...

    def end(self, seconds: float) -> None:
        """Ends it and all that it started; first it may take so many seconds to end by itself."""
        ...


Start = Callable[[Step, Path], Process]  # (step, file of its log)


class GroupProcess:
    """A command in a process group of its own, so that what it started ends with it."""

    def __init__(self, step: Step, log: Path):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        with log.open("wb") as target:
            self._process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def interrupt(self) -> None:
        """Python then ends with a traceback, and pytest with its summary."""
        self._signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        self.wait(seconds)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class Window(NamedTuple):
    """When a step may run at the latest, in seconds from the start of all."""

    begin: float
    end: float


def windows(steps: Sequence[Step], seconds: float) -> dict[str, Window]:
    """Shares of the time for the steps that run one after the other, by name."""
    in_turn = [step for step in steps if not step.background]
    total = sum(step.share for step in in_turn)
    found, begin = {}, 0.0
    for step in in_turn:
        end = begin + seconds * step.share / total
        found[step.name] = Window(begin, end)
        begin = end
    return found


@dataclass
class _Running:
    step: Step
    process: Process
    since: float


class Plan:
    """Runs steps in their order, each to its deadline at most, and keeps what they leave.

    Args:
        steps: in their order.
        out: a folder for logs, results and summary.txt; `out`.tar.gz is the archive of it.
        seconds: for everything.
        start: starts a step.
        clock: seconds from anywhere.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        seconds: float,
        start: Start = GroupProcess,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps = steps
        self.out = out
        self.seconds = seconds
        self.windows = windows(steps, seconds)
        self._start = start
        self._clock = clock
        self._zero = clock()
        self._behind: list[_Running] = []
        self._summary: list[str] = []
        self._failed = False

    def run(self) -> int:
        """Returns 1 if a step failed or was stopped, else 0."""
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            for step in self.steps:
                if not self._take(step):
                    self._note(f"{step.name} failed: what follows was left out")
                    break
            if not self.windows:  # nothing but what runs in the background
                self._await_behind()
        except KeyboardInterrupt:
            self._failed = True
            self._note("interrupted")
        finally:
            self._stop_behind(self._behind)
            archive(self.out)
        return int(self._failed)

    def _take(self, step: Step) -> bool:
        """Whether the next steps are worth their time."""
        self._stop_behind([x for x in self._behind if step.name in x.step.until])
        running = self._started(step)
        if running is None:
            return not step.essential
        if step.background:
            self._behind.append(running)
            return True
        code = None
        try:
            end = self._zero + self.windows[step.name].end - GRACE
            code = running.process.wait(end - self._clock())
        finally:  # interrupted, too, it leaves no process behind
            if code is None:
                running.process.interrupt()
            running.process.end(GRACE)
            self._note_end(running, code)
        self._look_behind()
        archive(self.out)
        return code in (0, None) or not step.essential

    def _started(self, step: Step) -> _Running | None:
        since = self._clock()
        try:
            return _Running(step, self._start(step, self.out / f"{step.name}.log"), since)
        except OSError as error:
            self._failed = True
            self._note(f"{step.name}: exit {NOT_STARTED}: {error}")
            return None

    def _look_behind(self) -> None:
        """Notes which steps in the background have ended."""
        for running in list(self._behind):
            code = running.process.wait(0)
            if code is not None:
                self._behind.remove(running)
                running.process.end(0)
                self._note_end(running, code)

    def _await_behind(self) -> None:
        for running in self._behind:
            running.process.wait(self._zero + self.seconds - GRACE - self._clock())

    def _stop_behind(self, chosen: Sequence[_Running]) -> None:
        self._look_behind()
        stopped = [running for running in chosen if running in self._behind]
        for running in stopped:
            running.process.interrupt()
        end = self._clock() + GRACE
        for running in stopped:
            self._behind.remove(running)
            running.process.end(end - self._clock())
            self._note_end(running, None)

    def _note_end(self, running: _Running, code: int | None) -> None:
        self._failed |= code != 0
        how = "stopped" if code is None else f"exit {code}"
        seconds = self._clock() - running.since
        at = running.since - self._zero
        self._note(f"{running.step.name}: {how} after {seconds:.0f} s, begun at {at:.0f} s")

    def _note(self, line: str) -> None:
        print(line, flush=True)
        self._summary.append(line)
        (self.out / "summary.txt").write_text("\n".join(self._summary) + "\n")


def archive(folder: Path) -> Path:
    """Packs a folder as `folder`.tar.gz, in place of what was there; leaves out large files."""

    def small(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return entry if entry.size <= LARGEST_FILE else None

    target = folder.with_name(f"{folder.name}.tar.gz")
    unfinished = target.with_name(f"{target.name}.new")
    with tarfile.open(unfinished, "w:gz", compresslevel=3) as pack:
        pack.add(folder, folder.name, filter=small)
    unfinished.replace(target)
    return target
