# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
THREADS := OMP_NUM_THREADS=1

.PHONY: demo test test-slow lint types

# .venv is made again only when the list of dependencies changes
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python tools/train.py
	$(BIN)/python tools/eval.py checkpoint=runs/shapes
	$(BIN)/python tools/infer.py checkpoint=runs/shapes source=data/shapes/val output=out/shapes
	@echo
	@echo "metrics     runs/shapes/eval/metrics.json"
	@echo "pictures    runs/shapes/eval/pictures/ (beside ground truth), out/shapes/ (detections)"
	@echo "curves      $(BIN)/tensorboard --logdir runs/shapes"

test: .venv/installed
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/installed
	$(THREADS) $(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/python -m mypy
