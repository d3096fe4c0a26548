# meta-train and test are the two commands of the README. Both build .venv under constraints.txt when it is missing or
# stale; python3 >= 3.11, pip and make are all that is needed.
PYTHON ?= python3
STAMP := .venv/.installed
BIN := .venv/bin
BENCH_STAMP := .venv-bench/.installed
BENCH_BIN := .venv-bench/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt
BENCH_INSTALL := $(BENCH_BIN)/python -m pip install -qq --constraint constraints.txt
SITE := build/site
OFFLINE ?=
MARKS := $(if $(OFFLINE),and not network)
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help meta-train suite results results-all test versions versions-lowest versions-newest bench bench-meta-gradient bench-tuneloss soak docs lint format clean

help:
	@echo "make meta-train   meta-train a policy with configs/quick.yaml (ARGS='--workers 4' adds options)"
	@echo "make results      the published table: docs/results.md, and the README's, from both folds of the suite palf12, in runs/palf12, with the published results of the other runs; hours on two cores; goes on where it was stopped"
	@echo "make results-all  the same, with the other runs done again too: learned schedule, constants, MAML-Loss, families never seen, transfers; many hours"
	@echo "make test         lint, types and all tests (OFFLINE=1 leaves out those that download)"
	@echo "make versions     a smoke run, and the tests of the loss, of tracking and of the registry, with the lowest versions of torch, ray, mlflow and all else that pyproject.toml takes, a download of 3 GB, and with the newest but for torch, which stays at its pin (versions-lowest, versions-newest: one of the two)"
	@echo "make bench        all benchmarks, one after the other: hours (ARGS=--write-docs saves their pages and figures in docs)"
	@echo "make bench-meta-gradient   meta-gradients against other libraries, which go into .venv-bench (ARGS='--rounds 2 --workloads A' makes it shorter)"
	@echo "make bench-tuneloss   trainings that TuneLoss and common searchers need (ARGS='--seeds 1' makes it shorter)"
	@echo "make soak         meta-training for 15 minutes while workers, nodes, drivers, disk and MLflow fail (ARGS='--minutes 60 --seed 7')"
	@echo "make docs         the documentation as a site, in build/site; needs no network"
	@echo "make lint         ruff and mypy only"
	@echo "make format       let ruff rewrite the sources"
	@echo "make clean        remove .venv and everything that tools left"

VERSIONS_TESTS := $(wildcard tests/test_adaptive_loss*.py) tests/test_own_losses.py tests/test_tracking.py tests/test_model_registry.py
VERSIONS = .venv-versions/$*
# The lowest that pyproject.toml takes: uv finds them, and is told those that matter most, so that it gives up none of
# them for the newest version of something else. Compiled, as by pip: else each of Ray's processes compiles what it
# imports as it starts, always where PYTHONDONTWRITEBYTECODE is set, and Ray gives them 30 seconds.
lowest_INSTALL = $(VERSIONS)/bin/uv pip install -q --compile-bytecode --python $(VERSIONS)/bin/python --resolution lowest-direct \
  $$(sed -nE 's/^  "((torch|ray|mlflow)(\[.*\])?)>=([0-9.]+)",$$/\1==\4/p' pyproject.toml | sort -u)
# The newest that go together, but for torch, whose newest build is gigabytes of CUDA.
newest_INSTALL = $(VERSIONS)/bin/python -m pip install -qq $$(grep '^torch==' constraints.txt) 'mlflow[auth]'

meta-train: $(STAMP)
	$(BIN)/palf-dist meta-train --config configs/quick.yaml $(ARGS)

# Each run is a target, its results.parquet. A run that has it is finished; remove its folder to have it done again. One
# that has begun is resumed. A name is KIND-PART; what KIND adds to the options:
RUNS := runs/palf12
FOLDS := fold-0 fold-1
LEARNED := schedule-0 schedule-1 constant-0 constant-1 maml-0 maml-1
FAMILIES := family-image family-text family-tabular
TRANSFERS := architecture-0 architecture-1 horizon-0 horizon-1
# What the policy of configs/palf12.yaml sets, learned in another way.
CONTROLS := --set "policy.basis=[ce, robust_ce, symmetric_ce, elr]" --set "policy.hyperparameters=[e, la, ew, wd, a, b, lam]"
schedule_OPTIONS := --set policy.kind=schedule $(CONTROLS) --set "evaluation.methods=[policy]"
constant_OPTIONS := --set policy.kind=constant $(CONTROLS) --set "evaluation.methods=[policy]"
maml_OPTIONS := --set policy.kind=maml $(CONTROLS) --set "evaluation.methods=[policy]"
# The other methods do not depend on what the policy was trained on: the folds have them.
family_OPTIONS := --set "evaluation.methods=[policy, policy_schedule, policy_shuffled, s5]"
# Networks that are trained on pictures and texts read no tables.
READ_0 := fashion-mnist, digits, newsgroups, snippets
READ_1 := crawl_tiles, crawl_tiles_fine, reuters-r52, fine_foods
architecture_OPTIONS = --set "tasks.architectures=[{kind: conv}, {kind: transformer, vocabulary: 512, length: 16}]" --set "data.held_out=[$(READ_$(part))]"
horizon_OPTIONS := --set inner.steps=2000
kind = $(firstword $(subst -, ,$*))
part = $(lastword $(subst -, ,$*))
results_of = $(1:%=$(RUNS)/%/results.parquet)

$(call results_of,$(FOLDS) $(LEARNED) $(FAMILIES)): $(RUNS)/%/results.parquet: | $(STAMP) suite
	if test -e $(@D)/config.yaml; then $(BIN)/palf-dist meta-train --resume $(@D) $(ARGS); \
	else $(BIN)/palf-dist meta-train --config configs/palf12.yaml --suite palf12 --fold $(part) $($(kind)_OPTIONS) --run-dir $(@D) $(ARGS); fi

$(call results_of,$(TRANSFERS)): $(RUNS)/%/results.parquet: | $(STAMP) suite $(call results_of,$(FOLDS))
	$(BIN)/palf-dist evaluate $(RUNS)/fold-$(part)/best --$(if $(wildcard $(@D)/config.yaml),resume,run-dir) $(@D) $($(kind)_OPTIONS) --set "evaluation.methods=[policy, s5]" $(ARGS)

.PRECIOUS: $(RUNS)/%/results.parquet
.NOTPARALLEL:

suite: $(STAMP)
	$(BIN)/palf-dist datasets fetch --suite palf12

# Beside the page lie the results of all runs but the folds, by the names of the runs: the page has them also where only
# the folds are done again. A run that is finished here takes the place of the one that was.
results: $(call results_of,$(FOLDS))
	mkdir -p docs/results
	for run in $$(dirname $(RUNS)/*/results.parquet); do case $$run in */fold-*) ;; *) cp $$run/results.parquet docs/results/$$(basename $$run).parquet;; esac || exit; done
	$(BIN)/palf-dist results $(FOLDS:%=$(RUNS)/%) $$(ls docs/results/*.parquet 2>/dev/null) --output docs
	$(BIN)/python -m benchmarks.readme

results-all: $(call results_of,$(FOLDS) $(LEARNED) $(FAMILIES) $(TRANSFERS)) results

test: lint
	$(BIN)/pytest -m "(not slow or compiles) $(MARKS)" $(SIDE_BY_SIDE) --cov --cov-report=
	$(BIN)/pytest -m "slow and not compiles and not alone $(MARKS)" $(SIDE_BY_SIDE) --cov --cov-append --cov-report=
	$(BIN)/pytest -m "alone $(MARKS)" --cov --cov-append --cov-report=term --cov-fail-under=90

versions: versions-lowest versions-newest

# Built anew each time, as what a registry has changes. What other versions warn of is theirs.
versions-lowest versions-newest: versions-%:
	@echo "building $(VERSIONS) with the $* versions"
	$(PYTHON) -m venv --clear $(VERSIONS)
	$(VERSIONS)/bin/python -m pip install -qq --constraint constraints.txt pip uv==0.13.9
	$($*_INSTALL) --editable . $$(grep -E '^(hypothesis|pytest|pytest-timeout|pytest-xdist)==' constraints.txt)
	runs=$$(mktemp -d) && MLFLOW_TRACKING_URI=sqlite:///$$runs/mlflow.db \
	  $(VERSIONS)/bin/palf-dist meta-train --config configs/smoke.yaml --run-dir $$runs/run
	$(VERSIONS)/bin/python -m pytest -q -o filterwarnings= $(VERSIONS_TESTS)

# Those that have a page of documentation take --write-docs; the others only print.
bench: $(STAMP) bench-meta-gradient
	for name in import_time learnloss_lp learnloss_certificates classifier online_learnloss; do $(BIN)/python -m benchmarks.$$name || exit; done
	for name in overhead rounds estimators hedge_regret scaling tuneloss; do $(BIN)/python -m benchmarks.$$name $(ARGS) || exit; done

bench-meta-gradient: $(BENCH_STAMP)
	$(BENCH_BIN)/python -m benchmarks.meta_gradient $(ARGS)

bench-tuneloss: $(STAMP)
	$(BIN)/python -m benchmarks.tuneloss $(ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.faults.soak $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs $(SITE)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-bench .venv-versions build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
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
	$(PIP_INSTALL) --no-build-isolation --editable '.[bench,docs,test]'
	@touch $@

# As .venv, with the libraries that meta-gradients are compared with, at the versions that were measured. One that cannot
# be compiled here is left out, and the benchmark says so.
$(BENCH_STAMP): pyproject.toml constraints.txt $(wildcard benchmarks/meta_gradient/requirements*.txt)
	@echo "building .venv-bench, for the libraries that meta-gradients are compared with"
	@test -f $@ || $(PYTHON) -m venv --clear .venv-bench
	@rm -f $@
	$(BENCH_INSTALL) pip setuptools cython==3.3.1
	$(BENCH_INSTALL) torch
	$(BENCH_INSTALL) --no-build-isolation --editable .
	$(BENCH_INSTALL) --no-deps --requirement benchmarks/meta_gradient/requirements.txt
	-$(BENCH_INSTALL) --no-deps --no-build-isolation --requirement benchmarks/meta_gradient/requirements_compiled.txt
	@touch $@
