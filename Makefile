# make bench: set up, build, train, measure, report.   make test: set up, build, test.
# Both need Python 3.10-3.13 with its headers, g++ and make; neither needs a GPU or nvcc.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Worker processes of the tests; each runs torch with one thread.
JOBS   ?= $(shell nproc)

.PHONY: build cuda gpu test triton sanitize bench smoke lint format clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "Python 3.10-3.13 is needed (make PYTHON=python3.12)")'
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.txt
	@# The clone itself is the package: edits take effect at once, and the build below keeps its object files.
	printf '%s\n' "$(CURDIR)" "$(CURDIR)/python" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bigmodel_kernels_development.pth"
	touch $@

build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace > build.log 2>&1 || { tail -n 40 build.log; exit 1; }

# With the CUDA kernels, which needs nvcc and no GPU; TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected.
cuda: $(VENV)/.installed
	@FORCE_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace --force > build.log 2>&1 || { tail -n 40 build.log; exit 1; }

# All that needs a GPU, in under nine minutes, with the Python at hand and nothing installed; STEP=name,name runs those steps.
gpu:
	$(PYTHON) -m benchmarks.gpu

test: build
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The Triton kernels compiled for GPUs not at hand, within their budgets, under another version of Triton, installed beside the environment.
TRITON ?= 3.6.0
triton: $(VENV)/.installed
	test -d build/triton-$(TRITON) || $(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) TRITON_CACHE_DIR=$(CURDIR)/build/triton-$(TRITON).cache $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/ops -k "compile or budget"

# The CPU kernels under AddressSanitizer and UBSan, every instruction set: some twenty minutes on 2 cores.
sanitize: $(VENV)/.installed
	$(BIN)/python tests/sanitize.py

bench: build
	$(BIN)/python -m bigmodel_models train cnn --out benchmarks/out/cnn
	$(BIN)/python -m benchmarks

# What continuous integration runs of the benchmark: a few cases, checked and timed briefly.
smoke: build
	$(BIN)/python -m benchmarks --quick

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf build build.log bigmodel_kernels/*.so benchmarks/out
