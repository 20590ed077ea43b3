"""Peak memory of a call in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def peak_memory(setup: str, call: str) -> float:
    """MiB that the expression `call` adds at its peak to a process that has run `setup`.

    Skips the test where the system does not tell. resource.getrusage would tell everywhere, but a
    process inherits its peak from the one that starts it, and after some tests pytest is so large
    that nothing which the child adds would show.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    code = f"{setup}\nfrom bench.memory import peak\nprint(peak(lambda: {call}, 'cpu'))"
    command = [sys.executable, "-c", code]
    child = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT
    )
    return int(child.stdout) / 2**20
