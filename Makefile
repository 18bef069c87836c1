# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
SEEDS ?= 1
RUN := $(VENV)/bin/python -m pipeline.cli

MINUTES ?= 5
SEED ?= 0
.PHONY: help setup demo test matrix test-all mutants faults slurm bench gpu lint clean
help:
	@echo "make setup            set up .venv and nothing more"
	@echo "make demo [SEEDS=3]   set up, fetch the small model and its data, run the whole pipeline, print the table"
	@echo "make test             set up with test dependencies, run the tests (TESTS=path: those, in one process)"
	@echo "make test-all         the tests, then sharded training against one process in every pair of factors (FULL=1: every combination, hours)"
	@echo "make matrix           sharded training against one process alone"
	@echo "make mutants          plant faults and see that the tests notice"
	@echo "make faults           kills, damage, full disks and more at random moments of the chain (MINUTES=5 SEED=0)"
	@echo "make slurm            job scripts on a real Slurm cluster, with faults (needs root and Slurm's programs)"
	@echo "make bench            what a step of each engine costs in host time"
	@echo "make gpu              on a machine with a GPU: parity, speed beside Trainer, memory, loading, the doctor, the demo (under 8 minutes)"
	@echo "make lint             ruff: its rules, and its format; mypy: the types of pipeline/ and launch/"
	@echo "make clean            remove .venv and runs"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is older: name one with make PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up $(VENV) (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@{ $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' 2>&1; \
		echo "pip ended with $$?"; } \
		| awk '/^WARNING: Location/ {next} /^pip ended with / {code = $$4; next} {print} END {exit code}' \
		|| { echo "error: pip could not install what $(VENV) needs: see above" >&2; exit 1; }
	@$(VENV)/bin/python -c 'import torch, deepspeed, transformers, peft, mlflow, pytest' >/dev/null 2>&1 || { echo "error: the installation into $(VENV) is not complete: see above" >&2; exit 1; }
	@touch $@

setup: $(VENV)/ready
	@echo "$(VENV) is ready: $(VENV)/bin/sap --help"

demo: $(VENV)/ready
	@$(VENV)/bin/python -m pipeline.stages.fetch
	@$(RUN) run launch/recipes/demo.yaml --seeds "$$($(PYTHON) -c 'print(list(range($(SEEDS))))')"

# A module stays in one process, so that what its tests share is made once.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/ready
	@$(VENV)/bin/python -m pytest $(or $(TESTS),$(PARALLEL))

matrix: $(VENV)/ready
	@FULL=$(FULL) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -s tests/distributed/equivalence.py

test-all: test matrix

mutants: $(VENV)/ready
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu $(VENV)/bin/python -m tests.tools.mutants

faults: $(VENV)/ready
	@$(VENV)/bin/python -m tests.tools.faults --minutes $(MINUTES) --seed $(SEED)

slurm: $(VENV)/ready
	@$(VENV)/bin/python -m pytest -q -s tests/slurm/chains.py tests/slurm/faults.py

bench: $(VENV)/ready
	@$(RUN) bench

# Without .venv: such a machine cannot fetch anything, and has torch in the Python that is given.
gpu:
	@$(PYTHON) -m tests.gpu.check

lint: $(VENV)/ready
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) runs
