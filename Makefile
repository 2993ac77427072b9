# make demo          set up .venv, build the extension, run the main job
# make test          set up if needed, run the tests: every law and feature, in minutes
# make test-all      all of them: every case, target, architecture and library, as CI does
# make check         lint, types and tests
# make gate          compile every kernel for every target and rewrite benchmarks/gate.csv (an hour)
# make weights       fetch the real weights that some tests use where they are there
# make test-oldest   a core subset with the oldest supported versions, in an environment of its own
# make test-newest   the same with the newest that pip finds
# make clean         remove what was built, not the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest
# Add "heavy" to test with DeepSpeed, Liger and Ray too; they are not needed otherwise, and do not install everywhere.
EXTRAS ?= demo,test,check
PIP := -m pip install -q --disable-pip-version-check
SOURCES := setup.py pyproject.toml packattn/schemas.py $(wildcard csrc/*)

.PHONY: setup demo test test-all gate weights test-oldest test-newest lint types check clean

setup: $(VENV)/built

# torch first: the extension is built against the torch that will run it.
$(VENV)/built: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "packattn needs Python 3.10 or newer; say which: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv python3-dev"; exit 1; }
	@echo "Setting up $(VENV): torch, triton, transformers, then the extension (some minutes the first time) ..."
	@$(BIN)/python $(PIP) "setuptools>=77" wheel ninja "torch>=2.10"
	@$(BIN)/python $(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	@$(BIN)/python -m packattn info
	@touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

# Twice: the compiled kernels and everything else, then the Triton kernels in Triton's interpreter.
define run_tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(1)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(1)
endef
test: setup
	$(call run_tests,-m "not slow")

test-all: setup
	$(call run_tests)

gate: setup
	$(BIN)/python -m benchmarks.gate

weights: setup
	$(BIN)/python -c "from benchmarks.demo import assets; assets.smollm2(); assets.minilm()"

# The extension that was built for one torch serves the others: that is what the stable ABI promises.
CORE := attention laws boundaries mask hf collator
define test_core
	PYTHONPATH=. $(1)/bin/python -m pytest -m "not slow" $(CORE:%=tests/test_%.py)
	PYTHONPATH=. TRITON_INTERPRET=1 $(1)/bin/python -m pytest -m "not slow" tests/test_attention.py
endef
TOOLS := accelerate matplotlib pytest pytest-timeout

OLDEST_VERSIONS := "torch==2.10.0" "transformers==5.8.0" "numpy<2.4"
test-oldest: setup
	@test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python $(PIP) $(OLDEST_VERSIONS) $(TOOLS)
	$(call test_core,$(OLDEST))

# Without pip's configuration, which may hold versions back.
test-newest: setup
	@test -x $(NEWEST)/bin/pip || $(PYTHON) -m venv $(NEWEST)
	@PIP_CONFIG_FILE=/dev/null $(NEWEST)/bin/python $(PIP) --upgrade torch transformers $(TOOLS)
	$(call test_core,$(NEWEST))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf build out *.egg-info packattn/*.so $(VENV)/built
