# Every target sets the environment up first. `make help` lists them. PYTHON=... names another Python, from 3.11 to 3.13.
BIN := .venv/bin
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.DEFAULT_GOAL := help
# The tests that use vLLM.
NEXT_TESTS := $(wildcard $(addprefix tests/test_,upstream.py vllm_api.py launch.py scheduler.py log_privacy.py lora_layers.py \
	cpu_*.py engine.py offline.py chat_turns.py gateway*.py serve*.py))
.PHONY: help setup lock check test test-all test-next demo clean soak-serve bench-train bench-serve bench-step bench-turns bench-loadtest bench-eval bench-fleet bench-gate loop gpu-proof check-deploy simulate-fleet bench-limit bench-quick

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.ready-$(EXTRA)  ## the environment in .venv: exact versions from locks/, extra cpu or cuda by what the machine has

.venv/.ready-$(EXTRA): locks/$(EXTRA).txt locks/setup.sh pyproject.toml
	@PYTHON='$(PYTHON)' sh locks/setup.sh $(EXTRA)

lock: setup  ## solve pyproject.toml again into locks/, for every Python and machine that it names
	$(BIN)/python locks/solve.py

check: setup  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## everything that runs in minutes, with real vLLM on tiny random models
	$(BIN)/python -m pytest -m "not slow"

test-next: .venv-next/.ready  ## the CUDA lock's vLLM on a CPU: its Python over the CPU build's compiled parts, in .venv-next
	.venv-next/bin/python -m pytest -m "not slow" $(NEXT_TESTS)

.venv-next/.ready: .venv/.ready-$(EXTRA) locks/cuda.txt locks/next_vllm.py
	$(BIN)/python locks/next_vllm.py

test-all: setup  ## make test, and what is slow
	$(BIN)/python -m pytest

demo: setup  ## fine-tune, hot-load, evaluate and load-test a small real model; ends with a report
	@$(BIN)/python demo.py

clean:  ## remove the environment and caches inside the clone (runs/ and store/ stay)
	rm -rf .venv .venv-next .mypy_cache .ruff_cache .pytest_cache

soak-serve: setup  ## 64 adapters, 4 slots, 16 streams, 3 minutes, one killed worker: every answer compared with PEFT's
	@$(BIN)/python -m benchmarks.soak

bench-train: setup  ## training speed and loss against plain TRL defaults, on this CPU (about 20 minutes)
	$(BIN)/python -m benchmarks.training

bench-serve: setup  ## LoRA serving against stock vLLM on this machine (two hours; QUICK=1: under 10 minutes)
	$(BIN)/python -m benchmarks.serving $(if $(QUICK),--quick)

bench-step: setup  ## where a decode step's milliseconds go, in stock vLLM and in ours (4 minutes)
	@$(BIN)/python -m benchmarks.decode_step

bench-limit: setup  ## what this machine reads and multiplies at most, and the speeds that follow for a model (under a minute)
	@$(BIN)/python -m benchmarks.limit

bench-quick: setup  ## before and after a change: serving over stock vLLM's, ratios only, one line of JSON (3 minutes)
	@$(BIN)/python -m benchmarks.quick

bench-turns: setup  ## how long an adapter waits while others occupy every slot, and what its turn costs them (10 minutes)
	@$(BIN)/python -m benchmarks.adapter_turns

bench-loadtest: setup  ## cost of the load-test client, how well it keeps an offered rate, parity with vllm bench serve (10 minutes)
	@$(BIN)/python -m benchmarks.loadtest

bench-gate: setup  ## what the crisis gate costs in throughput and to the first token, on a tiny model and a real one (15 minutes)
	@$(BIN)/python -m benchmarks.gate

bench-eval: setup  ## minutes for 100 questions x 2 models, likelihood against transformers, kill -9, batch against LLM.generate (RUN=name URL=... of a running server)
	@$(BIN)/python -m benchmarks.eval --run $(RUN) --adapter $(or $(ADAPTER),$(RUN)) --url $(or $(URL),http://127.0.0.1:8000/v1)

bench-fleet: setup  ## a fleet's front, adapter loads against other routings, requests lost per fault; stand-in engines (an hour; QUICK=1: 10 minutes)
	@$(BIN)/python -m benchmarks.fleet $(if $(QUICK),--quick)

simulate-fleet: setup  ## a fleet's homes and front in simulation, up to 100 replicas (10 minutes; QUICK=1: half a minute; MEASURED=FILE: beside a bench-fleet)
	@$(BIN)/python -m benchmarks.fleet_simulation $(if $(QUICK),--quick) $(if $(MEASURED),--measured $(MEASURED))

loop: setup  ## from votes to a promoted version with scripted people, and how often drawn votes get there (15 minutes; REPEATS=n)
	@$(BIN)/python -m benchmarks.loop $(if $(REPEATS),--repeats $(REPEATS))

gpu-proof: setup  ## does all of it work on this machine's NVIDIA GPU, and how fast? 8 minutes, one JSON, one page (TINY=1: on a CPU)
	@$(BIN)/python -m benchmarks.gpu_proof $(if $(TINY),--tiny)

check-deploy: setup  ## lint deploy/ with each format's own linter, as far as they are here or in the package index
	@sh deploy/check.sh
