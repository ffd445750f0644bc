# Set-up and checks; `make help` lists the commands. Only the standard library of Python and pip are needed to start.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

# Nothing from the caller's environment may stand in for what is installed in the virtual environment.
unexport PYTHONPATH PYTHONHOME

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.diveq-kernels-installed

CHECK_PYTHON = 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'

.PHONY: help setup demo test gpu lint clean

help:
	@echo "make demo    train the example VQ-VAEs on photographs (a few minutes on two cores);"
	@echo "             speech coding and image generation: see examples/README.md"
	@echo "make test    ruff, mypy and the tests"
	@echo "make gpu     what only a GPU can show, on the one that is here (under ten minutes)"
	@echo "make lint    ruff and mypy"
	@echo "make setup   only create the virtual environment, which the commands above do when needed"
	@echo "make clean   remove the virtual environment, builds and caches"
	@echo
	@echo "variables:   PYTHON=$(PYTHON) (3.10 or later)  VENV=$(VENV)  JOBS=$(JOBS) (test processes)"

setup: $(STAMP)

# torch and everything that asks for it are resolved in one call, and the package itself is built without isolation,
# so that nothing brings in a second torch.
$(STAMP): requirements/dev.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@test -x $(VENV)/bin/pip || { $(PYTHON) -c $(CHECK_PYTHON) && $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install -r requirements/dev.txt
	$(PY) -m pip install --no-deps --no-build-isolation --editable .
	$(PY) -m pip check
	@touch $@

demo: $(STAMP)
	$(PY) examples/train_vqvae.py --quick

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadgroup

gpu: $(STAMP)
	$(PY) tests/gpu.py

clean:
	rm -rf $(VENV) build dist diveq_kernels/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
