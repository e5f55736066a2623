# Everything that can be done with a checkout. Each target sets up what it needs, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
BASE ?= tiny
JOBS ?= 2

.PHONY: demo app families test test-slow lint types bench ablation format clean

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py --out "$(OUT)"

app: $(VENV)/.installed
	$(BIN)/sdlora app --base "$(BASE)" --library runs

families: $(VENV)/.installed
	$(BIN)/python benchmarks/families.py --out runs/families

# A file of tests stays within one process, so that what its tests share is made once.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m "slow or gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/train_step.py --out benchmarks/results
	$(BIN)/python benchmarks/train_step.py --models tiny --busy --steps-tiny 4 --rounds 1 --out benchmarks/results
	$(BIN)/python benchmarks/train_step.py --models tiny --file-pixels 3464 --out benchmarks/results
	$(BIN)/python benchmarks/generate.py --out benchmarks/results
	$(BIN)/python benchmarks/mixed.py --out benchmarks/results
	$(BIN)/python benchmarks/base_memory.py --out benchmarks/results
	$(BIN)/python benchmarks/data.py --out benchmarks/results
	$(BIN)/python benchmarks/buckets.py --out benchmarks/results
	$(BIN)/python benchmarks/history.py --out benchmarks/results
	$(BIN)/python benchmarks/batch_plan.py --out benchmarks/results

# Hours, on two cores; what was run already is kept in runs/ablation.
ablation: $(VENV)/.installed
	$(BIN)/python benchmarks/ablation.py run
	$(BIN)/python benchmarks/ablation.py report
	$(BIN)/python benchmarks/ablation.py time-to-concept

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# constraints.txt pins every version that is tested, torch among them.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sdlora needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,trackers,datasets]"
	@touch $@
