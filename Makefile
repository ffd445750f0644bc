# Set-up and checks; `make help` lists the commands. Only the standard library of Python and pip are needed to start.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
TOOLS  ?= memcheck racecheck synccheck

# Nothing from the caller's environment may stand in for what is installed in the virtual environment.
unexport PYTHONPATH PYTHONHOME

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.diveq-kernels-installed

# On a GPU nothing is installed: what runs there takes the virtual environment if there is one, else PYTHON and its
# PYTHONPATH, and the package is the one in this folder.
GPU_PY = $(if $(wildcard $(STAMP)),$(PY),$(PYTHON))
gpu tune bench-gpu sanitize-gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

CHECK_PYTHON = 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'

.PHONY: help setup demo test gpu tune bench bench-gpu lint sanitize sanitize-cuda sanitize-gpu clean

help:
	@echo "make demo          train the example VQ-VAEs on photographs (a few minutes on two cores);"
	@echo "                   speech coding and image generation: see examples/README.md"
	@echo "make test          ruff, mypy and the tests"
	@echo "make gpu           all tests that need a GPU, on the one that is here: under ten minutes, or in two runs,"
	@echo "                   GPU_OPTIONS=\"--part 1\" for what only a GPU can show, then 2; what it printed is in runs/gpu"
	@echo "make bench         times and memory beside the peers on this CPU (a few minutes; PARTS=\"rows dims\" for others)"
	@echo "make bench-gpu     the same on a GPU: at most ten minutes, nothing installed; run again to go on"
	@echo "make tune          tiles of the Triton kernels by time, on the GPU that is here: nine minutes, run again to go on"
	@echo "make lint          ruff and mypy"
	@echo "make sanitize      tests of the CPU kernels under AddressSanitizer and UBSan"
	@echo "make sanitize-cuda the same of the CUDA kernels, emulated on the CPU"
	@echo "make sanitize-gpu  tests of the GPU kernels under compute-sanitizer, on a GPU; TOOLS=memcheck for one tool"
	@echo "make setup         only create the virtual environment, which the commands above do when needed, but for those"
	@echo "                   on a GPU (gpu, bench-gpu, tune, sanitize-gpu): these install nothing, use it where it is there"
	@echo "                   and PYTHON where it is not, and see the caller's PYTHONPATH"
	@echo "make clean         remove the virtual environment, builds and caches"
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

gpu:
	$(GPU_PY) tests/gpu.py $(GPU_OPTIONS)

PARTS ?= check shapes operations compiled

bench: $(STAMP)
	$(PY) -m benchmarks.run --device cpu --part $(PARTS)

# Exit status 3: time was up, run it again.
bench-gpu:
	$(GPU_PY) -m benchmarks.run --device cuda --resume --minutes 9

# Before bench-gpu: times are those of the tiles that it finds. Exit status 3 as there.
tune:
	$(GPU_PY) -m benchmarks.tune --resume --minutes 9

sanitize: $(STAMP)
	$(PY) tests/sanitized.py cpu tests/test_native_cpu.py tests/test_native_cpu_few.py tests/test_native_cpu_screen.py \
		tests/test_compat_rotation.py tests/test_compat_commitment.py -q -k "not working_memory and not is_not_there"

sanitize-cuda: $(STAMP)
	$(PY) tests/sanitized.py cuda tests/test_native_cuda.py tests/test_left_out_cuda.py tests/test_nearest.py \
		tests/test_project.py tests/test_gradients.py tests/test_project_gradients.py tests/test_deterministic.py \
		tests/test_replace_kernels.py tests/test_usage_kernels.py -q \
		-k "cuda-cpu and not float64 and not 4096 and not no_temporary"

# Some tests of every kernel of the GPU backends.
EVERY_KERNEL = (float32 and not layouts and not the_torch_way and not is_due) or sorted_sums or many_codewords \
	or every_interval or (perplexity and not millions)

# Each tool on these; without a GPU or the tool this fails and says what is missing.
sanitize-gpu:
	@command -v compute-sanitizer > /dev/null || \
		{ echo "sanitize-gpu: compute-sanitizer is not on PATH (it comes with the CUDA toolkit)" >&2; exit 1; }
	@$(GPU_PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "sanitize-gpu: torch finds no GPU")'
	for tool in $(TOOLS); do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
			$(GPU_PY) -m pytest -q -p no:xdist tests/test_quantize.py tests/test_project.py tests/test_nearest.py \
			tests/test_gradients.py tests/test_project_gradients.py tests/test_deterministic.py \
			tests/test_replace_kernels.py tests/test_usage_kernels.py \
			-k "(cuda-cuda or triton-cuda) and not 4096 and ($(EVERY_KERNEL))" || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist diveq_kernels/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
