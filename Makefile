# Every target sets up what it needs; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

BIN := .venv/bin
ARGS ?=
WORKERS ?= 3
BENCH ?= model_load overlay handover
PIP_TOOLS := pip-tools==7.6.2

.PHONY: help setup servers demo test lint lock bench campaign clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv from the lock files; installs missing system packages when root
	@.ci/setup

servers:
	@.ci/setup tests

demo: setup ## Mount tierd over a real JuiceFS, load a model twice, show what was seen (ARGS=--help)
	@$(BIN)/python -m bench.demo $(ARGS)

test: servers lint ## Lint, then every test, some at once (WORKERS=3; ARGS="-k name" picks some)
	@[ -c /dev/fuse ] || { echo "make test: /dev/fuse is missing; the tests mount real file systems." \
		"Load the module (modprobe fuse), or start the container with --device /dev/fuse --cap-add SYS_ADMIN" >&2; exit 1; }
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup ## Style, format and types
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "make lint: run $(BIN)/ruff format" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary

lock: ## Write the lock files anew from pyproject.toml (UPGRADE=1 takes newer versions)
	@PYTHON="$${PYTHON:-python3.11}" PIP_TOOLS="$(PIP_TOOLS)" .ci/lock $(if $(UPGRADE),--upgrade)

bench: setup ## Measure model load time, the overlay beside its source, and kills and upgrades (root; BENCH=NAME, ARGS=--help)
	@for name in $(BENCH); do $(BIN)/python -m bench.$$name $(ARGS); done

campaign: servers ## What breaks such systems, many times over: minutes to an hour (ARGS="-k name" picks some)
	@$(BIN)/python -m pytest -m campaign $(ARGS)

clean: ## Remove what was built here
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
