# Everything that a fresh machine needs: `make demo` and `make test` build the environment themselves.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
ifndef EXTRA
EXTRA := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
endif
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
INSTALLED := $(VENV)/.installed-$(EXTRA)

.PHONY: help install demo test test-all check format docs bench results chaos wheel constraints

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo "Settings: EXTRA=cpu|gpu (now $(EXTRA)), VENV=folder (now $(VENV)), PYTHON=python3.11"

install: $(INSTALLED)  ## build the environment, with .venv/bin/rlhf in it

$(INSTALLED): pyproject.toml constraints.txt install.py
	@test -n "$(PYTHON)" || { echo "install: no Python 3.11 to 3.13 is on the PATH; install one," \
	  "or say where it is: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) install.py --venv $(VENV) --extra $(EXTRA)
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(INSTALLED)  ## the whole loop on an invented world: feedback, reward model, PPO, report
	@$(BIN)/rlhf demo $(ARGS)

test: $(INSTALLED)  ## the tests that need no Ray, for often
	@$(BIN)/pytest $(ARGS)

test-all: $(INSTALLED)  ## those, and those that start a local Ray and real vLLM: what CI runs
	@$(BIN)/pytest -m "not serve and not chaos and not gpu and not slow" $(ARGS)

check: $(INSTALLED)  ## lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## put the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(INSTALLED)  ## docs/commands.md and docs/configuration.md, from the code
	@$(BIN)/python docs/make.py

# Half an hour on 2 cores; those that take a finished run, a GPU or hours are commands of their own (docs/results.md).
BENCHMARKS = "loop.py" "loop.py --dispatcher" "pipeline.py --sizes 1M" "generator.py" "peers.py --rounds 1" \
	"growth.py --steps 2" "scale.py"

bench: $(INSTALLED)  ## benchmarks, each a ratio against a bound or a peer
	@missed=0; for words in $(BENCHMARKS); do \
	  echo "== $$words"; $(BIN)/python benchmarks/$$words || missed=1; done; exit $$missed

results: $(INSTALLED)  ## make the figures of docs/results.md again
	@$(BIN)/python benchmarks/results.py $(ARGS)

chaos: $(INSTALLED)  ## the tests that kill what they started
	@$(BIN)/pytest -m chaos $(ARGS)

wheel: $(INSTALLED)  ## dist/*.whl
	@$(BIN)/python -m build --wheel

constraints: $(INSTALLED)  ## resolve constraints.txt anew, to today's versions
	@$(BIN)/python install.py --venv $(VENV) --pin
