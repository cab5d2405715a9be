# make demo      real images to in-context answers, on a CPU, all set-up included
# make test      the core tests, all set-up included        make test-full   everything
# make check     format, lint, types                        make bench       timings on this machine
# make bench-gpu PY=python3    timings on a GPU host, with the Python and torch that are there
# make gate-write          commit what the kernels compile to, for triton 3.9 and 3.6, without a GPU
# make clean     removes what can be made again; never a run

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
PY ?= $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
TRITON ?= 3.9.0
OLD_TRITON := 3.6.0
BENCH ?= kernels
ARGS ?=
DEMO ?= quick
RUN ?= runs/demo

.PHONY: help demo test test-full check gate-write bench bench-gpu clean

help:
	@sed -n '1,7s/^# //p' Makefile

# torch first and alone: a CUDA host takes the default wheel, any other Linux the CPU one. Where pip
# knows no CPU wheel, uv fetches it (its --torch-backend knows where they are).
$(VENV)/torch: constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or newer with venv found; install one or give PYTHON=/path/to/python3" >&2; exit 1; fi
	@echo "setting up $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@torch=$$(sed -n 's/^torch==//p' constraints.txt); \
	if [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then $(PIP) install -q "torch==$$torch"; \
	else $(PIP) install -q "torch==$$torch+cpu" 2>/dev/null || { \
		$(PIP) install -q uv; VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/uv pip install -q --torch-backend=cpu "torch==$$torch"; }; fi
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	@$(PIP) install -q -e '.[demo]' || { \
		echo "make: the demo's renderer has no wheel here; photographs stand in for its frames" >&2; \
		$(PIP) install -q -e . scikit-image matplotlib; }
	@touch $@

# Oracles of tests without what they ask for, torchvision above all, which breaks others beside a CPU
# torch. A CUDA torch brings its own triton; beside a CPU one it checks kernels without a GPU.
$(VENV)/dev: $(VENV)/torch pyproject.toml
	@$(PIP) install -q -e '.[dev,demo,video]'
	@$(PIP) install -q --no-deps taming-transformers torch-fidelity
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install -q --no-deps 'triton==$(TRITON)' || \
		echo "make: triton has no wheel here; tests of kernels will be skipped" >&2
	@touch $@

# What only `make test-full` needs: Ray, what drives a browser, and torchtitan with the two packages
# that it imports and nothing else brings. It asks for a `datasets` older than the one of the tests,
# of which it uses nothing here.
$(VENV)/full: $(VENV)/dev
	@$(PIP) install -q -e '.[full]'
	@$(PIP) install -q --no-deps torchtitan spmd_types torchdata
	@touch $@

# The triton of torch 2.11, to compile with and no more: PYTHONPATH puts it before the other. A whole
# second environment would be 1 GB larger.
$(VENV)/triton-$(OLD_TRITON): | $(VENV)/torch
	@$(PIP) install -q --no-deps --target $@ 'triton==$(OLD_TRITON)' || \
		echo "make: triton $(OLD_TRITON) has no wheel here; tests of what it compiles will be skipped" >&2

demo: $(VENV)/demo
	@$(PY) -m examples.demo --out $(RUN) --size $(DEMO)

# Two worker processes of one thread each: a test's own threads would fight over the cores.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-full: $(VENV)/full $(VENV)/triton-$(OLD_TRITON)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "slow and not gpu"
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(PY) -m pytest -m gpu; \
	else echo "no CUDA device: the tests marked gpu were not run"; fi

check: $(VENV)/dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# All GPUs for the triton that CI installs, sm_90 for the older one; the tests check the same.
gate-write: $(VENV)/dev $(VENV)/triton-$(OLD_TRITON)
	$(PY) -m kernels.report --arch 80 89 90 100 --write
	PYTHONPATH=$(VENV)/triton-$(OLD_TRITON) $(PY) -m kernels.report --write

# What is timed by which program.
BENCH_kernels := kernels.bench
BENCH_attention := kernels.bench --only attention
BENCH_training := lvm.bench
BENCH_train := lvm.bench_train
BENCH_encode := tokenizer.bench
BENCH_build := visual_sentences.bench_build
BENCH_loader := visual_sentences.bench_loader
BENCH_generate := lvm.bench_generate
BENCH_MODULE = $(or $(BENCH_$(BENCH)),$(error BENCH=$(BENCH): wanted kernels, attention, training, train, encode, build, loader or generate))

bench: $(VENV)/dev
	@$(PY) -m $(BENCH_MODULE) $(ARGS)

bench-gpu:
	@$(PY) -m $(BENCH_MODULE) --device cuda $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
