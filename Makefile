PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
SERVERS := redis-server prometheus postgresql
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SERVERS)
INSTALLED := .venv/installed
# pip compiles modules on one core. `COMPILE` does it on all cores, after the last package, and leaves
# out what is hardly used: Python compiles that when it is first imported.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
# A few packages hold templates that are no Python; they are no error.
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/(tests|rllib|moto|transformers/models)/' $(1) || true

.PHONY: install servers demo demo-check test test-long check check-kernels \
	bench-engine bench-fairness bench-dispatch bench-peers bench-path bench-autoscaling bench-autoscaling-ray bench-repeats bench-jobs bench-presets bench-gpu bench-gpu-wheels accept-gpu \
	format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Octet needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@echo "installing the tested versions of all packages into .venv: about two minutes"
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev]'
	@$(call COMPILE,.venv/lib)
	touch $@

# The tests' reference for FP8, apart from .venv's packages: beside diffusers it slows every import.
.venv/reference: $(INSTALLED)
	$(PIP_INSTALL) --no-deps --target $@ torchao
	@$(call COMPILE,$@)

# Triton generates the CUDA code that `check-kernels` counts. It takes 700 MB, so nothing else has it.
.venv/triton: $(INSTALLED)
	$(PIP_INSTALL) --no-deps --target $@ triton

# matplotlib, for the plots of the measurements.
.venv/bench: $(INSTALLED)
	$(PIP_INSTALL) -e '.[bench]'
	@$(call COMPILE,.venv/lib)
	touch $@

demo: install
	@exec $(BIN)/octet demo --port $(PORT)

demo-check: install
	$(BIN)/python -m demo.check

# Only a warning where they cannot be installed: tests that want them are then skipped.
servers:
	@command -v redis-server >/dev/null && command -v prometheus >/dev/null && ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { $(APT_INSTALL) || { apt-get update -qq && $(APT_INSTALL); }; } >/dev/null 2>&1; \
	} || echo "tests with Redis, Prometheus or PostgreSQL are skipped: apt-get install $(SERVERS)"
	@command -v kubectl >/dev/null || echo "tests of Kubernetes manifests are skipped: there is no kubectl"

test: install .venv/reference servers
	@bash tests/run.sh $(BIN)/python

# Soaks and repetitions, which `make test` leaves out.
test-long: install .venv/reference
	$(BIN)/python -m pytest -m long tests

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The CUDA kernels of a transformer block, counted without a GPU; about 3 minutes.
check-kernels: .venv/triton
	PYTHONPATH=.venv/triton $(BIN)/python -W ignore -m bench.gpu.kernels
	PYTHONPATH=.venv/triton $(BIN)/python -m pytest tests/engine/test_kernels.py

# QUICK=1: less than 4 minutes.
bench-engine: .venv/bench
	$(BIN)/python -W ignore -m bench.engine $(if $(QUICK),--quick)

# What tenants feel of each other; QUICK=1: less than 8 minutes.
bench-fairness: .venv/bench
	$(BIN)/python -W ignore -m bench.fairness $(if $(QUICK),--quick)

# Requests per second of one Dispatcher, beside those of an earlier version; QUICK=1: two minutes.
bench-dispatch: install
	$(BIN)/python -W ignore -m bench.dispatch $(if $(QUICK),--quick)

# What the way of a request costs, apart from generating; about 2 minutes.
bench-path: .venv/bench
	$(BIN)/python -W ignore -m bench.path

# Other makers' servers, each in an environment of its own; torch and diffusers are those of .venv.
.venv/peers/%: bench/peers/constraints.txt $(INSTALLED)
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet -c $< $*
	echo "$(CURDIR)/$$(echo .venv/lib/python3*/site-packages)" >$$(echo $@/lib/python3*/site-packages)/torch-of-octet.pth
	touch $@

# Octet compared with other ways to serve the same model; about 50 minutes, QUICK=1: about 10.
bench-peers: .venv/bench .venv/peers/litserve .venv/peers/bentoml
	$(BIN)/python -W ignore -m bench.peers $(if $(QUICK),--quick)

# Policies in the simulator; about an hour; QUICK=1: less than 8 minutes.
bench-autoscaling: .venv/bench
	$(BIN)/python -W ignore -m bench.autoscaling $(if $(QUICK),--quick)

# The demo model on real Ray, from nothing and back; about 9 minutes.
bench-autoscaling-ray: .venv/bench
	$(BIN)/python -W ignore -m bench.autoscaling_ray

# Jobs and batches with Generators that only wait; URL: an empty PostgreSQL to measure too. About 20 minutes;
# QUICK=1: 3 minutes.
bench-jobs: .venv/bench
	$(BIN)/python -W ignore -m bench.jobs $(if $(QUICK),--quick) $(if $(URL),--url $(URL))

# What the demo model's presets save and lose; half an hour; QUICK=1: less than 7 minutes.
bench-presets: .venv/bench
	$(BIN)/python -W ignore -m bench.presets $(if $(QUICK),--quick)

# Repeated requests, from memory and through Redis; about 4 minutes.
bench-repeats: .venv/bench servers
	$(BIN)/python -W ignore -m bench.repeats

# On a machine with a GPU; writes bench/results/DATE-CARD.json. QUICK=1: less than 10 minutes, and
# only what matters most. GPU_PYTHON names a Python that has torch and transformers already: the rest
# comes from `make bench-gpu-wheels`, on any machine.
ifdef QUICK
bench-gpu: $(if $(GPU_PYTHON),,install)
	PYTHONPATH=$(if $(GPU_PYTHON),build/gpu-packages) $(or $(GPU_PYTHON),$(BIN)/python) -W ignore \
	  -m bench.gpu.quick
else
bench-gpu: install .venv/reference
	PYTHONPATH=.venv/reference $(BIN)/python -W ignore -m bench.gpu.steps
	$(BIN)/python -W ignore -m bench.gpu.packing --side 512
	$(BIN)/python -W ignore -m bench.gpu.packing --side 1024
	$(BIN)/python -W ignore -m bench.gpu.packing --side 1024 --together --seconds 60
	-$(BIN)/python -W ignore -m bench.gpu.packing --side 1024 --together --seconds 60 --mps
	$(BIN)/python -W ignore -m bench.gpu.engine
endif

bench-gpu-wheels: install
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target build/gpu-packages \
	  --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
	  --platform manylinux2014_x86_64 -c constraints.txt \
	  diffusers importlib_metadata pydantic pydantic_core annotated_types typing_inspection
	@du -sh build/gpu-packages

# A card's owner runs this and sends back the JSON file that it names.
accept-gpu: .venv/bench
	$(BIN)/python -W ignore -m bench.gpu.accept $(if $(MODEL),--model $(MODEL))

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
