# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
#   PYTHON=python3.12   the interpreter that .venv is made from
#   MAX_JOBS=1          files compiled at a time
#   PYTEST_ARGS=...     further arguments for pytest
#   EXAMPLE_ARGS="--loss eager"   arguments for the example
#   COMPATIBILITY_ARGS="bert clip"   the models to compare, by the names of their folders
#   SANITIZE_ARGS=thread   one of the two builds of `make sanitize` (see tests/tools/sanitize.py)
#   MINUTES=10          how long make fuzz looks for faults
#   FUZZ_ARGS="--repeat FAMILY:DTYPE:SEED"   arguments for it (see tests/tools/fuzz)
#   GATE_ARGS=--update  renew the register snapshot (see tests/tools/compile_gate.py)
#   TRITON=3.6.0        the version that `make gates` compiles with, beside that of .venv

PYTHON ?= python3
PYTEST_ARGS ?=
GATE_ARGS ?=
COMPATIBILITY_ARGS ?=
SANITIZE_ARGS ?=
MINUTES ?= 10
FUZZ_ARGS ?=
EXAMPLE_ARGS ?=
export MAX_JOBS ?= $(shell nproc)

VENV := .venv
OTHER_TRITON := $(TRITON:%=build/triton-%)
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.installed
EXTENSION := vlmfast/_C.abi3.so
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.h)
FORMATTED := $(CPP_FILES) $(wildcard tests/tools/*.cpp tests/tools/*/*.c tests/emulation/*.h)

.DEFAULT_GOAL := help
.PHONY: help build demo example test fuzz sanitize compatibility gates bench lint format clean distclean

help:
	@echo "make demo       patch real models, check them, time them side by side; results in out/"
	@echo "make example    train a small CLIP with the fused loss, in two processes"
	@echo "make test       every test that needs no GPU"
	@echo "make compatibility  every model of transformers that can be built small, patched against itself"
	@echo "make fuzz       random problems for the C++ kernels, ten minutes of them; MINUTES=n"
	@echo "make gates      compile every Triton configuration for every listed GPU, without a GPU"
	@echo "make sanitize   the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make bench      ten minutes: the kernels against their peers on this machine; out/bench/"
	@echo "make lint       ruff, clang-format, mypy;  make format mends what can be mended"
	@echo "make build      the environment and the C++ extension alone"
	@echo "make clean      remove what was built;  make distclean removes .venv, too"

build: $(EXTENSION)

demo: $(EXTENSION)
	$(BIN)/python -m vlmfast demo

example: $(EXTENSION)
	PYTHONPATH=. $(BIN)/torchrun --nproc-per-node 2 examples/train_clip.py $(EXAMPLE_ARGS)

test: $(EXTENSION)
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_tools_guard.py $(wildcard tests/test_kernels_*.py)

compatibility: $(EXTENSION)
	PYTHONPATH=tests $(BIN)/python -m tools.compatibility $(COMPATIBILITY_ARGS)

fuzz: $(EXTENSION)
	PYTHONPATH=tests $(BIN)/python -m tools.fuzz --minutes $(MINUTES) $(FUZZ_ARGS)

gates: $(ENVIRONMENT) $(OTHER_TRITON)
	PYTHONPATH=$(OTHER_TRITON:%=%:)tests $(BIN)/python -m tools.compile_gate $(GATE_ARGS)

build/triton-%: $(ENVIRONMENT)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

sanitize: $(EXTENSION)
	PYTHONPATH=tests $(BIN)/python -m tools.sanitize $(SANITIZE_ARGS)

bench: $(EXTENSION)
	$(BIN)/python -m bench --selection --sweeps --memory --mode both --minutes 10 --seconds 1 --out out/bench

lint: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf build dist out *.egg-info vlmfast/*.so
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache .benchmarks
	find bench kernels tests vlmfast -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# torch goes first and alone: whatever else asks for it then finds the build that is there.
$(ENVIRONMENT): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "vlmfast needs Python 3.10 or later; say which: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@command -v $(CXX) >/dev/null \
	  || { echo "no C++ compiler ($(CXX)); on Debian: apt install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -r constraints.txt
	@touch $@

$(EXTENSION): $(ENVIRONMENT) setup.py $(CPP_FILES)
	@mkdir -p build
	@echo "building $@ (log: build/build.log)"
	@$(BIN)/python setup.py build_ext --inplace >build/build.log 2>&1 \
	  || { cat build/build.log; exit 1; }
	@touch $@
