# make env    a virtual environment in .venv with exactly the versions of requirements.lock
# make demo   real text and a real language model to a trained autoencoder, tables, SQL and viewer JSON
# make test   all tests that need no GPU        make check  lint, types, structure, secrets
# make test-readers  what is exported and imported, against SAELens, sparsify and SAEDashboard themselves (installs them)
# make bench  benchmarks; those for a GPU say so and end   make fmt    format the code
# make viewer        builds the viewer's bundle (jobs/bundle) from viewer/
# make check-viewer  its types, and that the bundle is what viewer/ gives   make test-viewer  its tests
# make clean  remove what the other targets made, .venv excepted
#
# PYTHON=...    the interpreter that .venv is made from (3.11 or newer)
# TEST_WORKERS=2  the processes that make test runs files in; 0 to see prints and to debug
# KEEP_TORCH=1  keep the torch and triton that .venv has or sees already, such as a GPU build of your own

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
KEEP_TORCH ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
PY := .venv/bin/python
STAMP := .venv/installed
LOCK := requirements.lock
SERVERS := tests/node_modules/installed
VIEWER := viewer/node_modules/installed
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

# Spinning worker threads slow each other down many times over when cores are shared.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help env demo test test-long test-readers check scan fmt bench clean viewer check-viewer test-viewer

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

env: $(STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: " \
	    "name another one with make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

# torch comes first and alone with its dependencies, so that pip picks the build (CPU or CUDA) of this
# machine; everything else is pinned in the lock and needs no resolving.
$(STAMP): $(LOCK) pyproject.toml | $(PY)
	$(if $(KEEP_TORCH),,$(PIP) -r <(grep -E '^(torch|triton)==' $(LOCK)))
	$(PIP) --no-deps -r <(grep -vE '^(torch|triton)==' $(LOCK))
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: env
	$(PY) -m sae.jobs.demo

# An emulator of Azure's store, which no Python package has.
$(SERVERS): tests/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix tests --silent --no-audit --no-fund && touch $@; \
	else echo "npm is not installed: tests that need an emulator of Azure's store are skipped"; fi

test: env $(SERVERS)
	$(PY) -m pytest -m "not gpu and not long and not readers" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Trainings that are killed, interrupted and set up wrongly, jobs of a cluster, each with workers that have to start;
# every variant of the kernels, and more steps and seeds of what make test does.
test-long: env $(SERVERS)
	$(PY) -m pytest -m "long and not gpu" $(PYTEST_ARGS)

# SAELens' and sparsify's own packages, each in an environment of its own: minutes, and gigabytes the first time.
# SAEDashboard's, which asks for both, without what it asks for: its reader needs none of it.
test-readers: env
	$(PIP) --no-deps --upgrade --target .venv/dashboard sae-dashboard==0.8.0
	SAE_READERS=$${SAE_READERS:-.venv/readers} PYTHONPATH=.venv/dashboard $(PY) -m pytest -m readers $(PYTEST_ARGS) \
	    tests/readers tests/jobs/test_exports.py

check: env
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_structure.py
	bash -n .ci/run
	$(MAKE) --no-print-directory scan

# Hex digests are data here (the lake's log is full of them), and the tests' own servers take "test" for a key.
scan: env
	git ls-files -z --cached --others --exclude-standard | xargs -0 .venv/bin/detect-secrets-hook \
	    --no-verify --disable-plugin HexHighEntropyString --exclude-secrets '^test$$'  # pragma: allowlist secret

fmt: env
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

$(VIEWER): viewer/package-lock.json
	npm ci --prefix viewer --silent --no-audit --no-fund
	@touch $@

viewer: $(VIEWER)
	npm run --prefix viewer --silent build

check-viewer: $(VIEWER)
	npm run --prefix viewer --silent check
	@built=$$(mktemp -d); trap 'rm -rf "$$built"' EXIT; \
	(cd viewer && npx vite build --logLevel warn --outDir "$$built" --emptyOutDir); \
	diff -rq jobs/bundle "$$built" || { echo "jobs/bundle is not what viewer/ gives: make viewer"; exit 1; }

# Those in a browser need Chromium (apt-get install chromium) and are skipped without it.
test-viewer: env $(VIEWER)
	npm run --prefix viewer --silent test

# Modules whose name starts with _ are shared code.
bench: env
	@for name in $(basename $(notdir $(wildcard benchmarks/[a-z]*.py))); do \
	    echo "== $$name"; $(PY) -m "benchmarks.$$name"; done

clean:
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
