"""The extension with AVX-512 emulated: its AVX-512 variants run on machines without it, slowly.

`python -m tools.emulation` (with tests/ on PYTHONPATH) builds it and prints where it lies. With
VLMFAST_EXTENSION set to that path, vlmfast loads it in place of its own.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# -O3 would take three times as long to compile, and would not make it fast.
FLAGS = ("-DVLMFAST_EMULATE_AVX512", f"-I{ROOT / 'tests'}", "-Wno-psabi", "-O1")


def build(directory: Path = ROOT / "build" / "emulated", flags: Sequence[str] = ()) -> Path:
    """Builds the extension below `directory`, with further compiler flags; returns its path."""
    subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-lib", str(directory), "--build-temp", str(directory / "objects")),
        ],
        cwd=ROOT,
        env={**os.environ, "VLMFAST_CXX_FLAGS": " ".join([*FLAGS, *flags])},
        check=True,
    )
    (extension,) = (directory / "vlmfast").glob("_C*.so")
    return extension


if __name__ == "__main__":
    print(build())
