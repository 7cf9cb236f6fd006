# The README's commands. Each makes .venv when it is missing, installs with the pinned versions, and works
# on a machine that has only Python, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart/$(shell date -u +%Y-%m-%dT%H-%M-%SZ)

.PHONY: quickstart test test-grid test-slow strangers check format docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[test]'
	touch $@

## fine-tune a real 135M model on two CPU cores and print base against tuned
quickstart: $(VENV)/.installed
	$(BIN)/python -m qlora_phi3 recipe quickstart --out $(RUN_DIR)

## the fast tests: offline, on the CPU, minutes on two cores
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadscope

## for every night: the combinations of settings that the fast tests leave out
test-grid: $(VENV)/.installed
	$(BIN)/python -m pytest -m grid -n auto

## the tests on the built-in model
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -n auto --dist loadfile

## strangers' days: commands, signals and damage in random order, for so many minutes
MINUTES ?= 5
strangers: $(VENV)/.installed
	$(BIN)/python tests/strangers/machine.py --minutes $(MINUTES)

## lint, format, types, rooms
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

## mend the format
format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## fill the generated parts of README and docs/
docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info
