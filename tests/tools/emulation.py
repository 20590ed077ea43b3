"""The extension with AVX-512 emulated: its AVX-512 variants run on machines without it, slowly.

`python -m tools.emulation` (with tests/ on PYTHONPATH) builds it and prints where it lies. With
VLMFAST_EXTENSION set to that path, vlmfast loads it in place of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ["-DVLMFAST_EMULATE_AVX512", f"-I{ROOT / 'tests'}", "-Wno-psabi"]


def build(directory: Path = ROOT / "build" / "emulated", flags: list[str] | None = None) -> Path:
    """Builds the extension below `directory`, with further compiler flags; returns its path."""
    compiler_flags = " ".join([os.environ.get("CFLAGS", ""), *FLAGS, *(flags or [])])
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"]
        + ["--build-lib", str(directory), "--build-temp", str(directory / "objects")],
        cwd=ROOT,
        env={**os.environ, "CFLAGS": compiler_flags},
        check=True,
    )
    (extension,) = (directory / "vlmfast").glob("_C*.so")
    return extension


if __name__ == "__main__":
    print(build())
