# make train [ARGS="RECIPE.yaml section.key=value"]   trains; without ARGS, the embedded default
# make test  [ARGS="tests/data -k plan"]              runs the tests
# make check                                          lint, format and types
PYTHON ?= python3
VENV := .venv
ARGS ?=

.PHONY: train test check clean

train: $(VENV)/.train
	@PYTHON=$(VENV)/bin/python launch/local.sh $(ARGS)

test: $(VENV)/.test
	@$(VENV)/bin/python -m pytest $(ARGS)

check: $(VENV)/.test
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.test: requirements-dev.txt $(VENV)/.train
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) data runs
