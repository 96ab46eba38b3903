# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#
# Everything runs in .venv, which `make setup` fills and every other target brings up
# to date first. Paths are relative, so that the checkout's own path may hold spaces.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo rl chain test test-all lint types docs clean FORCE
SHELL := /bin/sh

PY := .venv/bin/python
READY := .venv/.ready
# Tests run in as many processes. Each may start an engine of up to 4 GiB.
WORKERS ?= 2
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal
MODULES := build/modules.txt
INPUTS := $(MODULES) Makefile CMakeLists.txt upstream.toml pyproject.toml setup.py \
	$(wildcard csrc/*/* requirements/*.txt tools/*.py patches/* patches/*/* patches/*/*/*)

# without a terminal (CI), bars and colours only blur the log
ifeq ($(MAKE_TERMOUT),)
export NO_COLOR := 1
export PIP_PROGRESS_BAR := off
$(READY): export PIP_QUIET := 1
endif

# Else each of the hundreds of processes that tests start compiles vLLM's sources anew.
unexport PYTHONDONTWRITEBYTECODE

# an advertisement for another program
export NO_MKDOCS_2_WARNING := 1

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(READY)  ## make .venv with the patched vLLM and what the tests need

demo: $(READY)  ## train, serve and prove a model on real text
	$(PY) examples/custom_model_training_to_inference.py
	$(PY) examples/offline_inference/custom_model_with_megatron.py --tensor-parallel-size 1

rl: $(READY)  ## train a model by rewards, with vLLM as its sampler
	$(PY) examples/rl/grpo.py --expect 0.8

chain: $(READY)  ## a stock model: train, serve, sync, reinforce and adapt it
	$(PY) examples/chain.py

test: lint docs  ## run every check, and the tests that CI runs
	$(PYTEST) -m "not gpu and not slow"
	$(PY) -m tools upstream-tests

test-all: lint docs  ## run every check and every test; takes an hour
	$(PYTEST) -m "not gpu" --results benchmarks/results/cpu-tests.json
	$(PY) -m tools upstream-tests

lint: types  ## check the patch set, style and types
	$(PY) -m tools check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Our modules are checked in the composed tree, among vLLM's own.
types: $(READY)
	$(PY) -m mypy setup.py tools
	cd build/develop && ../../$(PY) -m mypy --config-file ../../pyproject.toml \
	  --cache-dir ../../.mypy_cache $$(grep '\.py$$' ../modules.txt)

docs: $(READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

clean:  ## remove .venv and everything built; downloads stay in the user's cache
	rm -rf .venv build site .mypy_cache .pytest_cache .ruff_cache

# The stamp is made last: a setup that failed or was interrupted is taken up again.
$(READY): $(INPUTS)
	@rm -f $@
	@if ! $(PY) -c 'import pip' 2>/dev/null; then \
	  for python in python3.11 python3; do \
	    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      2>/dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "error: no python3.11 or newer with the module venv: install Python 3.11" \
	      "(on Debian and Ubuntu: python3.11 and python3.11-venv)." >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$($$python --version)"; \
	  $$python -m venv --clear .venv; \
	fi
	$(PY) -m tools develop -- -r requirements/dev.txt
	$(PY) -m pip install --no-deps -r requirements/no-deps.txt
	@touch $@

# The list of new modules, renewed only when one was added or removed: an edit in one
# of them takes effect without another setup.
$(MODULES): FORCE
	@mkdir -p build
	@find vllm vllm_generic -type f ! -name '*.pyc' | sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
