# Every target sets the environment up first. `make help` lists them.
PYTHON ?= python3.11
BIN := .venv/bin
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# uv does not read pip's find-links; where pip has a local wheel folder, uv gets it too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help setup lock check test test-all demo clean soak-serve bench-train bench-serve bench-step bench-loadtest bench-eval

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.ready  ## the environment in .venv: exact versions from locks/, extra cpu or cuda by what the machine has

.venv/.ready: locks/$(EXTRA).txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv==0.13.9
	@# A local CPU torch wheel needs no further index; elsewhere uv knows the public one.
	@# Bytecode now: it halves the start of each of the many processes to come.
	@$(BIN)/uv pip install --quiet --compile-bytecode --requirement locks/$(EXTRA).txt \
	    $$(ls $(UV_FIND_LINKS)/torch-*+cpu-*.whl >/dev/null 2>&1 || echo --torch-backend=$$(test $(EXTRA) = cpu && echo cpu || echo auto))
	@$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: setup  ## solve pyproject.toml again into locks/
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --quiet --no-annotate --no-header --generate-hashes --output-file locks/cpu.txt
	$(BIN)/uv pip compile pyproject.toml --extra cuda --extra dev --quiet --no-annotate --no-header --generate-hashes --output-file locks/cuda.txt

check: setup  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## everything that runs in minutes, with real vLLM on tiny random models
	$(BIN)/python -m pytest -m "not slow"

test-all: setup  ## make test, and what is slow
	$(BIN)/python -m pytest

demo: setup  ## fine-tune, hot-load, evaluate and load-test a small real model; ends with a report
	@$(BIN)/python demo.py

clean:  ## remove the environment and caches inside the clone (runs/ and store/ stay)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache

soak-serve: setup  ## 64 adapters, 4 slots, 16 streams, 3 minutes, one killed worker: every answer held against PEFT
	@$(BIN)/python -m tests.soak_serve

bench-train: setup  ## training speed and loss against plain TRL defaults, on this CPU (about 15 minutes)
	$(BIN)/python -m train.bench

bench-serve: setup  ## LoRA serving against stock vLLM on this machine (two hours; QUICK=1: under 10 minutes)
	$(BIN)/python -m serve.bench $(if $(QUICK),--quick)

bench-step: setup  ## where a decode step's milliseconds go, in stock vLLM and in ours
	@$(BIN)/python -m serve.bench_step

bench-loadtest: setup  ## cost of the load-test client, how well it keeps an offered rate, parity with vllm bench serve (10 minutes)
	@$(BIN)/python -m tests.bench_loadtest

bench-eval: setup  ## minutes for 100 questions x 2 models, likelihood against transformers, kill -9, batch against LLM.generate (RUN=name URL=... of a running server)
	@$(BIN)/python -m tests.bench_eval --run $(RUN) --adapter $(or $(ADAPTER),$(RUN)) --url $(or $(URL),http://127.0.0.1:8000/v1)
