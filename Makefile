# Works from a fresh clone with nothing installed by hand but Python (with venv), a C++20 compiler and make.
#   PYTHON=python3.12   the interpreter the virtual environment is made with
#   VENV=.venv          where it goes
#   ARGS="-k qmix"      passed on to pytest by test, bench and sanitize
#   FUZZ_SECONDS=600    a longer fuzz in sanitize

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc bindings -type f 2>/dev/null)
CPP_SOURCES = $(shell find csrc bindings -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# torch's OpenMP threads spin while they wait, which is costly beside other processes on the same cores.
RUN := OMP_WAIT_POLICY=passive

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format sanitize clean

help:
	@echo "make demo      QMIX misses the optimum of the papers' matrix game, ResQ and POWQMIX find it (5 seeds each)"
	@echo "make test      the whole test suite"
	@echo "make bench     the benchmarks: ours, eager PyTorch and torch.compile interleaved"
	@echo "make lint      ruff, mypy, clang-format (check only);  make format mends what it can and renews fastmix/_core.pyi"
	@echo "make sanitize  the compiled core's tests and a short fuzz under AddressSanitizer and UBSan"
	@echo "make install   only the virtual environment in $(VENV) with the pinned set of constraints.txt"
	@echo "make clean     removes the builds, the caches and $(VENV); keeps runs/"

install: $(VENV)/.installed

$(VENV)/bin/python:
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]}: the pinned set needs 3.11 or newer (make PYTHON=python3.11 ...)")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== torch and the build tools, pinned by constraints.txt"
	@$(PIP) torch
	@$(PIP) scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE_SOURCES)
	@echo "== fastmix: compiling the core and installing"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[train,dev]'
	@touch $@

DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
define DEMO_SUMMARY
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
games = json.loads((folder / "matrix1.json").read_text())["algorithms"]
print("\nThe optimum is AA with 8; one agent alone on A costs 12; CC, the second best, pays 7.9.")
for name, game in games.items():
    print(f"  {name:<8} found it with {game['found']} of {game['seeds']} seeds")
print("A monotonic mix (QMIX) cannot represent this payoff, and CC is what it can tell apart best. ResQ completes it by a")
print("residual; POWQMIX fits it only where an action may be optimal. Theirs, of the papers, stands beside ours above.")
print(f"Tables, figure, logs and checkpoints are in {folder}.")
endef
export DEMO_SUMMARY

demo: $(VENV)/.installed
	@echo "== QMIX, ResQ and POWQMIX on the papers' one-step matrix game: 5 seeds each"
	@$(RUN) $(BIN)/fastmix reproduce matrix1 --algos qmix resq powqmix --seeds 5 --out $(DEMO)
	@$(BIN)/python -c "$$DEMO_SUMMARY" $(DEMO)

test: $(VENV)/.installed
	@echo "== pytest"
	@$(RUN) $(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.installed
	@$(RUN) $(BIN)/python -m pytest --benchmark-only $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.installed
	$(BIN)/python -m tests.core_stub
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

SANITIZED := build/sanitize
SANITIZER_LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
FUZZ_SECONDS ?= 20
# Leaks are not looked for: the interpreter keeps its objects until the end.
SANITIZE_RUN = $(RUN) LD_PRELOAD="$(SANITIZER_LIBRARIES)" UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=0 SANITIZED_CORE="$(abspath $(SANITIZED))"

sanitize: $(VENV)/.installed
	@echo "== the core with AddressSanitizer and UBSan in $(SANITIZED)"
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTMIX_SANITIZE=ON \
		-DFASTMIX_CUDA=OFF -DPython_EXECUTABLE="$(abspath $(BIN)/python)" >/dev/null
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)
	@$(SANITIZE_RUN) $(BIN)/python -m tests.fuzz.canary 2>&1 | grep -q "AddressSanitizer: heap-buffer-overflow" \
		|| { echo "AddressSanitizer did not notice a read past the end: is it active?"; exit 1; }
	@echo "== tests of the ops and of predator-prey"
	@$(SANITIZE_RUN) $(BIN)/python -m pytest -p tests.fuzz.core -p no:cacheprovider tests/ops tests/envs/test_prey.py $(ARGS)
	@echo "== random problems, $(FUZZ_SECONDS) s on each instruction set"
	@for isa in baseline avx2 avx512; do \
		$(SANITIZE_RUN) FASTMIX_ISA=$$isa $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) || exit 1; \
	done

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastmix tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
