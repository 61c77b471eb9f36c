# Everything a newcomer needs: `make run`, `make demo`, `make compare`, `make ui`, `make test`.
# The virtual environment is made on first use; only python3 (3.11+) and make are assumed.

PYTHON ?= python3
# auto picks the CPU or the CUDA build of torch for this machine; cpu, cu130 … choose by hand.
TORCH ?= auto
PORT ?= 5000

BIN := .venv/bin
# A folder of local wheels, where this machine's pip has one, is handed on to uv.
LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null),$(shell $(PYTHON) -m pip config get :env:.find-links 2>/dev/null))
TORCH_BACKEND := $(if $(LINKS),,--torch-backend=$(TORCH))
# For the test that installs the wheel: the same wheels, the same build of torch.
UV_SETTINGS = UV_FIND_LINKS="$(LINKS)" $(if $(LINKS),,UV_TORCH_BACKEND=$(TORCH))

# Independent implementations for parity tests. Outside site-packages: torchvision's wheel is the
# CUDA one, which CPU torch and transformers cannot import.
PEERS := timm==1.0.31 torchvision==0.29.2

.DEFAULT_GOAL := help
.PHONY: help run demo compare ui evidence test tests-with-ray tests-without-ray test-long gpu lint audit format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@touch $@

$(BIN)/.run: $(BIN)/.uv pyproject.toml constraints.txt
	@echo "Installing in .venv, which takes minutes the first time: PyTorch, Ray, MLflow and what they need"
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(TORCH_BACKEND) -c constraints.txt -e ".[jpeg,sample]"
	@touch $@

$(BIN)/.dev: $(BIN)/.uv pyproject.toml constraints.txt
	@echo "Installing in .venv what tests need, too; this takes minutes the first time"
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(TORCH_BACKEND) -c constraints.txt -e ".[dev]"
	$(BIN)/uv pip install -q --no-deps --target .venv/peers $(PEERS)
	@touch $@ $(BIN)/.run

$(BIN)/.evidence: $(BIN)/.dev
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(TORCH_BACKEND) -c constraints.txt -e ".[dev,efficientnet]"
	@touch $@

run: $(BIN)/.run  ## images to a reviewed run in three minutes on two cores (IMAGES=folder for your own)
	$(BIN)/beit quickstart --config jobs/configs/quickstart.yaml $(if $(IMAGES),--prepare.source "$(IMAGES)" --output "work/$(notdir $(abspath $(IMAGES)))") $(ARGS)

demo: $(BIN)/.run  ## MAE on the sample, long enough that its features beat raw pixels (eight minutes on two cores)
	$(BIN)/beit quickstart --config jobs/configs/demo.yaml $(ARGS)

compare: $(BIN)/.run  ## BEiT, BEiT v2 and MAE on the sample for about the same time, and one table (14 minutes on two cores)
	$(BIN)/beit pipeline --config jobs/configs/compare.yaml $(ARGS)

evidence: $(BIN)/.evidence  ## the experiments of docs/evidence.md that are still open (ARGS="--experiment views --most 3", DEVICE=cuda)
	$(BIN)/python -m benchmarks.evidence.run $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

ui: $(BIN)/.run  ## the MLflow pages of everything run here
	@$(BIN)/beit ui --port $(PORT)

# Tests that start Ray wait half of the time: lint and the other tests run beside them, and what
# those print comes at the end. With ARGS, for some of the tests, all run in one go.
PYTEST = $(UV_SETTINGS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest
BESIDE := .pytest_cache/beside.log

test: $(BIN)/.dev  ## lint, types, import rules and tests
ifdef ARGS
	@$(MAKE) lint
	$(PYTEST) -m "not long and not gpu" $(ARGS)
else
	@mkdir -p $(dir $(BESIDE)) && rm -f $(BESIDE)
	@$(MAKE) --no-print-directory -j2 tests-with-ray tests-without-ray; code=$$?; \
	cat $(BESIDE) 2>/dev/null; exit $$code
endif

tests-with-ray:
	$(PYTEST) -m "not long and ray"

tests-without-ray: lint
	$(PYTEST) -m "not long and not ray and not gpu" > $(BESIDE) 2>&1

test-long: $(BIN)/.dev  ## the tests that take minutes: lost nodes, killed drivers, failing stores, published sizes
	$(UV_SETTINGS) $(BIN)/python -m pytest -m long $(ARGS)

gpu: $(BIN)/.dev  ## every GPU test and benchmark; writes benchmarks/results/gpu-NAME.md (exit code 2: no GPU)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: $(BIN)/.dev  ## lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Asserts, random numbers that are no secrets and programs that are called by name are meant.
audit: $(BIN)/.dev  ## known vulnerabilities of the pinned dependencies (asks PyPI), and rules of security
	$(BIN)/uv pip check --python $(BIN)/python
	$(BIN)/ruff check --select S --ignore S101,S105,S112,S311,S603,S607 beit pipelines jobs
	UV_FIND_LINKS="$(LINKS)" $(BIN)/uv tool run pip-audit --strict --no-deps --disable-pip -r constraints.txt \
	  || { echo "audit: vulnerable, or PyPI's list of vulnerabilities could not be asked; see above"; exit 1; }

format: $(BIN)/.dev  ## formats the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## removes caches and build leftovers; results and the environment stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find beit benchmarks jobs pipelines tests -name __pycache__ -prune -exec rm -rf {} +
