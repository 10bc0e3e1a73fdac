# Everything runs in .venv, made on first use. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types venv bench reproduce-voc07 wheel clean

demo: venv
	$(BIN)/altopt run-all

test: venv
	$(BIN)/python -m pytest

check: lint types test

lint: venv
	$(BIN)/ruff check .

types: venv
	$(BIN)/mypy

venv: .venv/installed

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# ARGS passes options on, e.g. ARGS="--archive VOCtrainval_06-Nov-2007.tar --archive VOCtest_06-Nov-2007.tar".
# RUN_ARGS goes to run-all, e.g. RUN_ARGS="--from M0=vgg16-397923af.pth --device cuda".
reproduce-voc07: venv
	$(BIN)/altopt fetch-voc07 --data-root data $(ARGS)
	$(BIN)/altopt run-all --recipe voc07-vgg16 --data-root data $(RUN_ARGS)
	$(BIN)/altopt beside --run voc07-vgg16

# ARGS passes options on, e.g. ARGS="--networks vgg16 --sizes 600x800 --rounds 5".
bench: venv
	$(BIN)/python -m benchmarks.bench --save benchmarks/bench.json --markdown benchmarks/RESULTS.md $(ARGS)

wheel: venv
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m tests.wheel_contents dist

# Never touches runs/ and data/.
clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
