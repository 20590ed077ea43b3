"""Builds the extension `vlmfast._C`; everything else about the package stands in pyproject.toml."""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

# The interpreter of a virtual environment that is not activated has its ninja beside it, but not
# on PATH, and BuildExtension without ninja compiles one file after the other.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

# The oldest torch whose stable ABI the extension may use: one binary serves it and all later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

CSRC = Path("csrc")
CPU_SOURCES = [CSRC / "module.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
HEADERS = sorted(CSRC.glob("**/*.h"))

# No -march: the instruction set is a pragma within each kernel file, chosen at run time, so that
# one binary runs everywhere. No -ffast-math: infinities and NaN mean something in attention.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Undo two flags that an interpreter may hand down: debug info multiplies the build's size
    # and time, and wrapping integers keep loops over int indices from being vectorised.
    "-g0",
    "-fno-wrapv",
    # Of a build for tests: another optimisation, a sanitizer, the emulation of AVX-512.
    *os.environ.get("VLMFAST_CXX_FLAGS", "").split(),
]
# Symbols of a CUDA build of torch are reached through libtorch.so, which the linker would drop
# because nothing in it is used directly.
LINK_FLAGS = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]

extension = Extension(
    "vlmfast._C",
    sources=[str(path) for path in CPU_SOURCES],
    depends=["setup.py", *(str(path) for path in HEADERS)],
    include_dirs=[str(CSRC.absolute()), *include_paths()],
    library_dirs=library_paths(),
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
    extra_compile_args=CXX_FLAGS,
    extra_link_args=LINK_FLAGS,
    language="c++",
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
