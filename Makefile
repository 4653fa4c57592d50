# make study: a real result from a clean clone. make test: the tests. PYTHON=python3.12 make test: with another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quick
# Runs at a time; each has a CPU device of its own, on which small products and passes over memory run beside the other's.
LANES ?= 2
# On glibc a CPU run keeps the memory it frees instead of faulting it in again; other systems ignore the variable.
MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.top_pad=268435456:glibc.malloc.trim_threshold=17179869184

.PHONY: study test lint slow clean

# The stamp is newer than pyproject.toml when the environment holds what it asks for.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[report,test,lint]'
	touch $@

study: $(VENV)/.installed
	$(BIN)/python -m launch.data --fetch=wiki
	$(MEMORY) $(BIN)/python -m launch.study --experiment=noise_factorial:quick --lanes=$(LANES) --workdir=$(WORKDIR)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info
