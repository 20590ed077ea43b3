"""Programs that one step runs beside each other."""

import contextlib
import subprocess
import time
from collections.abc import Sequence

PATIENCE = 4.0  # seconds for all that were interrupted to end


def run_each(commands: Sequence[Sequence[str]]) -> list[int]:
    """Exit statuses of commands that run at the same time."""
    return wait_for_all([subprocess.Popen(command) for command in commands])


def wait_for_all(processes: Sequence[subprocess.Popen]) -> list[int]:
    """Exit statuses; an interrupt, which goes to all, lets them write what they have."""
    try:
        return [process.wait() for process in processes]
    except KeyboardInterrupt:
        end = time.monotonic() + PATIENCE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        raise
