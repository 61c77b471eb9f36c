# Everything a newcomer needs: `make run`, `make demo`, `make ui`, `make test`.
# The virtual environment is made on first use; only python3 (3.11+) and make are assumed.

PYTHON ?= python3
# auto picks the CPU or the CUDA build of torch for this machine; cpu, cu130 … choose by hand.
TORCH ?= auto

BIN := .venv/bin
# A folder of local wheels, where this machine's pip has one, is handed on to uv.
LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null),$(shell $(PYTHON) -m pip config get :env:.find-links 2>/dev/null))
TORCH_BACKEND := $(if $(LINKS),,--torch-backend=$(TORCH))

.DEFAULT_GOAL := help
.PHONY: help run demo ui test lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@touch $@

$(BIN)/.run: $(BIN)/.uv pyproject.toml constraints.txt
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv pip install -q --python $(BIN)/python $(TORCH_BACKEND) -c constraints.txt -e ".[jpeg,sample]"
	@touch $@

$(BIN)/.dev: $(BIN)/.uv pyproject.toml constraints.txt
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv pip install -q --python $(BIN)/python $(TORCH_BACKEND) -c constraints.txt -e ".[dev]"
	@touch $@ $(BIN)/.run
