# Everything runs in .venv, made on first use. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo quick test check lint types venv bench gpu-check reproduce-voc07 wheel clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 26

demo: venv ## all seven stages on synthetic images, in minutes
	$(BIN)/altopt run-all

quick: venv ## the tests of parts, in less than a minute: no whole runs, no further processes
	$(BIN)/python -m pytest -m "not whole and not slow and not torture and not browser" $(ARGS)

test: venv ## all tests that CI runs, in minutes; ARGS="-m slow" or "-m torture" for the others
	$(BIN)/python -m pytest $(ARGS)

check: lint types test ## what CI runs: ruff, mypy and the tests

lint: venv ## ruff alone
	$(BIN)/ruff check .

# The sources and benchmarks are strict; tests are checked inside their functions, which need no annotations.
types: venv ## mypy alone
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

venv: .venv/installed

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# ARGS passes options on, e.g. ARGS="--archive VOCtrainval_06-Nov-2007.tar --archive VOCtest_06-Nov-2007.tar".
# RUN_ARGS goes to run-all, e.g. RUN_ARGS="--from M0=vgg16-397923af.pth --device cuda".
reproduce-voc07: venv ## fetch PASCAL VOC 2007, train with VGG16, print the scores beside the paper's
	$(BIN)/altopt fetch voc07 --data-root data $(ARGS)
	$(BIN)/altopt run-all --recipe voc07-vgg16 --data-root data $(RUN_ARGS)
	$(BIN)/altopt compare-published --run voc07-vgg16

bench: venv ## time a step of every stage, into benchmarks/RESULTS.md; ARGS="--networks vgg16 --sizes 600x800"
	$(BIN)/python -m benchmarks.bench --save benchmarks/bench.json --markdown benchmarks/RESULTS.md $(ARGS)

# Builds no environment: a machine with a GPU may have no network, and its own torch.
gpu-check: ## what a GPU can show in eight minutes, into the folder gpu-check/; ARGS="--out FOLDER"
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check $(ARGS)

wheel: venv ## build the wheel into dist/ and check what it holds
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m tests.wheel_contents dist

clean: ## remove the environment and what was built; never runs/ and data/
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
