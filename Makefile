# meta-train and test are the two commands of the README. Both build .venv under constraints.txt when it is missing or
# stale; python3 >= 3.11, pip and make are all that is needed.
PYTHON ?= python3
STAMP := .venv/.installed
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt
OFFLINE ?=
MARKS := $(if $(OFFLINE),and not network)

.DEFAULT_GOAL := help
.PHONY: help meta-train results test bench bench-tuneloss soak lint format clean

help:
	@echo "make meta-train   meta-train a policy with configs/quick.yaml (ARGS='--workers 4' adds options)"
	@echo "make results      the published table: docs/results.md, and the README's, from both folds of the suite palf12, in runs/palf12; goes on where it was stopped"
	@echo "make test         lint, types and all tests (OFFLINE=1 leaves out those that download)"
	@echo "make bench        all benchmarks, one after the other: hours"
	@echo "make bench-tuneloss   trainings that TuneLoss and common searchers need (ARGS='--seeds 1' makes it shorter)"
	@echo "make soak         meta-training for 15 minutes while workers, nodes, drivers, disk and MLflow fail (ARGS='--minutes 60 --seed 7')"
	@echo "make lint         ruff and mypy only"
	@echo "make format       let ruff rewrite the sources"
	@echo "make clean        remove .venv and everything that tools left"

meta-train: $(STAMP)
	$(BIN)/palf-dist meta-train --config configs/quick.yaml $(ARGS)

# A run that has results is finished: resumed, it would be evaluated anew. Remove it to have it done again.
results: $(STAMP)
	$(BIN)/palf-dist datasets fetch --suite palf12
	for fold in 0 1; do \
	  run=runs/palf12/fold-$$fold; \
	  if test -e $$run/results.parquet; then continue; \
	  elif test -e $$run/config.yaml; then $(BIN)/palf-dist meta-train --resume $$run $(ARGS); \
	  else $(BIN)/palf-dist meta-train --config configs/palf12.yaml --suite palf12 --fold $$fold --run-dir $$run $(ARGS); \
	  fi || exit; \
	done
	$(BIN)/palf-dist results runs/palf12/fold-0 runs/palf12/fold-1 --output docs
	$(BIN)/python -m benchmarks.readme

test: lint
	$(BIN)/pytest -m "not slow $(MARKS)" --numprocesses auto --maxprocesses 4 --dist loadfile --cov --cov-report=
	$(BIN)/pytest -m "slow $(MARKS)" --cov --cov-append --cov-report=term --cov-fail-under=90

bench: $(STAMP)
	for name in hedge_regret learnloss_lp learnloss_certificates classifier online_learnloss overhead scaling tuneloss; do $(BIN)/python -m benchmarks.$$name || exit; done

bench-tuneloss: $(STAMP)
	$(BIN)/python -m benchmarks.tuneloss $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.faults.soak $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an install that was interrupted left none, and starts again from an empty .venv. torch goes
# first and by its pin, so that no other package's requirement picks another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1); name another one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "building .venv under constraints.txt: takes two minutes and 2 GB the first time"
	@test -f $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	$(PIP_INSTALL) pip setuptools
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --no-build-isolation --editable '.[bench,test]'
	@touch $@
