# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml Makefile $(shell find retina tools tests examples configs -name '*.py' -o -name '*.yaml')

NULL_GPU ?= ../shared/gpu/null
.PHONY: demo test test-lab test-slow bench null-gpu chaos mutants lint types

# made again only when the list of dependencies changes
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# a finished training says so and is not repeated
demo: .venv/installed
	$(BIN)/python tools/train.py
	$(BIN)/python tools/infer.py checkpoint=runs/shapes source=data/shapes/val output=out/shapes
	$(BIN)/python tools/eval.py checkpoint=runs/shapes
	@echo
	@echo "report    runs/shapes/eval/report.html"
	@echo "metrics   runs/shapes/eval/metrics.json"
	@echo "pictures  runs/shapes/eval/pictures/ (beside ground truth), out/shapes/ (detections)"
	@echo "curves    $(BIN)/tensorboard --logdir runs/shapes"

# green tests are not repeated until something changes (make -B test repeats them)
test: .venv/tested
	@echo "tests: green, nothing changed since $$(date -r .venv/tested '+%Y-%m-%d %H:%M')"

.venv/tested: .venv/installed $(SOURCES)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore tests/lab --ignore tests/benchmarks
	touch $@

# the lab and the benchmarks stand beside the road, and so do their tests
test-lab: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests/lab tests/benchmarks

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

# speed and memory beside the oracles, on an otherwise idle machine; docs/performance.md has the figures
bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark.py all

# kernels, waits, memory and traffic of a training step, counted on a CUDA device that computes nothing: docs/performance.md
null-gpu: .venv/installed
	@[ -x $(NULL_GPU)/null ] || { echo "$(NULL_GPU)/null: no null CUDA device there - make null-gpu NULL_GPU=its folder"; exit 2; }
	OMP_NUM_THREADS=1 $(NULL_GPU)/null $(BIN)/python tools/benchmark.py launches --device cuda --output out/null_gpu.json

# real kills, signals, full disks, flipped bits, hostile files: one table
chaos: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos

# breaks the safety code on purpose, to see that tests notice
mutants: .venv/installed
	$(BIN)/python tests/mutants.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/python -m mypy
