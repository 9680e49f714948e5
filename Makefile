# `make demo` and `make test` set up all they need in .venv, once; see README.md.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# A stack is a file of requirements/stacks: a version of Python, torch and OpenMMLab's packages.
STACK ?= pinned
STACK_FILE := requirements/stacks/$(STACK).txt
STACK_PYTHON := $(shell sed -n '1s/^\# Python \([0-9.]*\).*/\1/p' $(STACK_FILE) 2>/dev/null)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.done
DEMO := work_dirs/demo
DEMO_CONFIG := configs/mask_rcnn_lasnet_r101_demo.py
# A folder with a ready-made mmcv wheel saves compiling it (12 minutes on 2 cores).
WHEELS ?= $(wildcard ../shared/wheels)
NATIVE := $(wildcard ops/*.cpp ops/*/*.cpp ops/*/*.h ops/*/*.cu ops/*/*.cuh)
FAST := -m "not slow"
# By file, for their fixtures; one thread each.
PYTEST = OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -n logical --maxprocesses 8 --dist loadfile --durations=25
TESTS ?= $(FAST)
# What tells within minutes whether a stack works: import, ops against the reference with few drawn
# cases, reference outputs, one training step and sparse inference of the main config, detection.
SHORT := tests/test_plugin.py tests/test_readme_lines.py tests/test_golden.py \
  tests/ops/test_masks.py tests/ops/test_packing.py tests/ops/test_sparse_ops.py tests/ops/test_channel_ops.py \
  "tests/test_configs.py::test_trains_and_infers[mask_rcnn_lasnet_r101.py]"
STACKS := $(basename $(notdir $(wildcard requirements/stacks/*.txt)))
COPY := $(VENV)/src
GOLDEN := ../shared/golden
GPU_TESTS := tests/ops/test_cuda_device.py
# A few drawn cases; torch's own memory pool would hide accesses beside a tensor.
GPU_SANITIZE := LAS_MM_HYPOTHESIS_SCALE=0.02 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

.PHONY: help setup benchmark test test-slow test-stack test-stack-short test-gpu cuda-build cuda-resources sanitize lint docs docs-figures demo clean distclean

help:
	@echo "make demo       train and evaluate the main config, scaled down, on rendered data"
	@echo "make test       lint, type check and tests that take seconds"
	@echo "make test-slow  also the tests that train for minutes"
	@echo "make test-stack STACK=openmmlab  the tests on another set of versions, in .venv-openmmlab"
	@echo "make test-stack-short STACK=openmmlab  a few minutes of them"
	@echo "make test-gpu   build the CUDA kernels and compare them with the CPU; needs a GPU"
	@echo "make cuda-build build and import the CUDA kernels aside, for 6 generations of GPUs; needs nvcc, no GPU"
	@echo "make cuda-resources  also check their registers, occupancy and instructions (ARCHITECTURES=\"75 80\": only these)"
	@echo "make sanitize   tests of the ops under AddressSanitizer and UBSan (GCC, 3 minutes to build)"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make docs-figures  which figures of the documentation are older than what they speak of"
	@echo "make benchmark  every measurement of docs/performance.md: about 25 minutes, on an idle machine"
	@echo "make setup      only the environment in .venv"
	@echo "make clean      remove build files and the demo's data and output, to start it anew"
	@echo "make distclean  remove .venv and .venv-* too"

$(DONE)/venv:
	@echo "== [1/6] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed ($(STACK_PYTHON) is tested), got " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@mkdir -p $(DONE) && touch $@

$(DONE)/build: requirements/build.txt | $(DONE)/venv
	@echo "== [2/6] build tools"
	$(BIN)/pip install --quiet -r requirements/build.txt
	@touch $@

# What other packages compile against.
$(DONE)/torch: $(STACK_FILE) | $(DONE)/build
	@echo "== [3/6] torch (about 2 minutes)"
	$(BIN)/pip install -r <(grep -E '^(torch|torchvision|numpy)\b' $<)
	@touch $@

# --verbose shows the compiler's steps when mmcv has to be built; the whole log stays in $(VENV).
$(DONE)/mm: $(STACK_FILE) | $(DONE)/torch
	@echo "== [4/6] OpenMMLab packages ($(if $(WHEELS),mmcv wheel from $(WHEELS),compiling mmcv: about 12 minutes on 2 cores))"
	@export LAS_MM_CXX="$${CXX:-g++}"; \
	  $(if $(WHEELS),PIP_FIND_LINKS=$(abspath $(WHEELS))) \
	  $(if $(filter pinned,$(STACK)),CXX=$(CURDIR)/requirements/cxx20.sh) \
	  $(BIN)/pip install --verbose --no-build-isolation -r $< 2>&1 \
	  | tee $(VENV)/mm-install.log \
	  | sed -nu -e 's/^ *\[\([0-9]*\/[0-9]*\)\] .*/   compiling mmcv \1/p' -e '/^Collecting \(onedl\|mm\)/p' -e '/^ *Downloading \(onedl\|mm\)/p' -e '/^Building wheel/p' -e '/^Successfully/p' \
	  || { tail -n 40 $(VENV)/mm-install.log; exit 1; }
	@touch $@

$(DONE)/tools: requirements/dev.txt requirements/demo.txt | $(DONE)/mm
	@echo "== [5/6] test and demo tools"
	$(BIN)/pip install --quiet -r requirements/dev.txt -r requirements/demo.txt
	@touch $@

$(DONE)/las_mm: setup.py pyproject.toml las_mm/version.py $(NATIVE) | $(DONE)/tools
	@echo "== [6/6] las_mm with its native ops"
	$(BIN)/pip install --quiet --no-build-isolation -e .
	@touch $@

setup: $(DONE)/las_mm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The first half of the drawn cases; `make test-slow` draws all.
test: export LAS_MM_HYPOTHESIS_SCALE ?= 0.5
test: lint
	$(PYTEST) $(FAST)

test-slow: lint
	$(PYTEST)

# Stacks ------------------------------------------------------------------------------------------

test-stack-short: export LAS_MM_HYPOTHESIS_SCALE ?= 0.1
test-stack-short: TESTS := $(SHORT)
test-stack test-stack-short:
	@case " $(STACKS) " in *" $(STACK) "*) ;; *) echo "STACK must be one of $(STACKS); got $(STACK)"; exit 2; esac
	@python=python$(STACK_PYTHON); \
	  $$python -c '' 2>/dev/null || python=$$(pyenv prefix "$$(pyenv latest $(STACK_PYTHON))")/bin/python \
	  || { echo "test-stack: $(STACK) needs Python $(STACK_PYTHON), on the PATH or in pyenv"; exit 1; }; \
	  $(MAKE) --no-print-directory STACK=$(STACK) VENV=.venv-$(STACK) PYTHON=$$python TESTS='$(TESTS)' stack-tests

# The tests run in a copy of the checkout: native ops of two stacks with one Python have one name.
.PHONY: stack-tests stack-copy
stack-tests: $(DONE)/copy
	cd $(COPY) && $(if $(wildcard $(GOLDEN)),LAS_MM_GOLDEN=$${LAS_MM_GOLDEN:-$(abspath $(GOLDEN))}) $(PYTEST) $(TESTS)

# Tests' tools in the newest versions for that Python and numpy.
$(DONE)/test-tools: requirements/dev.txt requirements/demo.txt | $(DONE)/mm
	@echo "== [5/6] test tools"
	$(BIN)/pip install --quiet -r $(STACK_FILE) -r <(sed -n '/^\(import-linter\|mypy\|pre-commit\|ruff\|types-\)/!s/==.*//p' $^)
	@touch $@

stack-copy: | $(DONE)/test-tools
	@mkdir -p $(COPY)/las_mm && mv $(COPY) $(COPY).old && mkdir $(COPY)
	@git ls-files -coz --exclude-standard | xargs -0 ls -d 2>/dev/null | tar -cf - -T - | tar -xf - -C $(COPY)
	@find $(COPY).old/las_mm -name '_C*.so' -exec mv {} $(COPY)/las_mm/ \; && rm -rf $(COPY).old

$(DONE)/copy: setup.py pyproject.toml las_mm/version.py $(NATIVE) | stack-copy
	@echo "== [6/6] las_mm with its native ops"
	$(BIN)/pip install --quiet --no-build-isolation -e $(COPY)
	@touch $@

# FORCE_CUDA names the missing compiler; without it a build would quietly be for the CPU only.
test-gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and f"test-gpu: needs an NVIDIA GPU and its driver; torch {torch.__version__} (CUDA {torch.version.cuda}) sees none")'
	FORCE_CUDA=1 $(BIN)/pip install --quiet --no-build-isolation -e .
	$(BIN)/python -m pytest $(GPU_TESTS)
	@if command -v compute-sanitizer; then \
	  set -x; \
	  $(GPU_SANITIZE) --tool memcheck $(BIN)/python -m pytest $(GPU_TESTS) -k "not graph"; \
	  $(GPU_SANITIZE) --tool racecheck $(BIN)/python -m pytest $(GPU_TESTS) -k "not graph"; \
	else \
	  echo "test-gpu: compute-sanitizer is not on the PATH; memory accesses were not checked"; \
	fi

# Both say so and succeed where there is no nvcc. The installed extension stays as it is.
cuda-build: setup
	$(BIN)/python dev/cuda_resources.py --optional --build-only

cuda-resources: setup
	$(BIN)/python dev/cuda_resources.py --optional $(if $(ARCHITECTURES),--architectures $(ARCHITECTURES))

sanitize: setup
	PYTHON=$(CURDIR)/$(BIN)/python tests/ops/sanitize.sh

docs-figures: setup
	$(BIN)/python dev/docs_figures.py

docs: setup
	$(BIN)/pip install --quiet -r requirements/docs.txt
	$(BIN)/mkdocs build --strict --quiet

$(DEMO)/epoch_20.pth: $(DEMO_CONFIG) | setup
	$(BIN)/python tools/make_demo_coco.py
	LAS_MM_COCO=data/demo_coco LAS_MM_PRETRAINED=none $(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO) --resume
	@test -f $@ && touch $@

demo: setup $(DEMO)/epoch_20.pth
	LAS_MM_COCO=data/demo_coco LAS_MM_PRETRAINED=none $(BIN)/python tools/test.py $(DEMO_CONFIG) $(DEMO)/epoch_20.pth --work-dir $(DEMO) --show-dir $(DEMO)/pictures
	$(BIN)/python tools/plot_log.py $(DEMO) --out $(DEMO)/curves.png
	LAS_MM_PRETRAINED=none $(BIN)/las_mm masks $(DEMO_CONFIG) data/demo_coco/val2017 --checkpoint $(DEMO)/epoch_20.pth --out-dir $(DEMO)/masks
	@echo "== measured here: the trained network, static and dynamic, on 8 of its images"
	LAS_MM_PRETRAINED=none $(BIN)/las_mm benchmark $(DEMO_CONFIG) --checkpoint $(DEMO)/epoch_20.pth --masks model --images data/demo_coco/val2017 --shape 8 3 256 256 --engines eager las_mm-static --whole-model --rounds 7 --json $(DEMO)/benchmark.json
	@echo "pictures: $(DEMO)/pictures (detections beside the computed patches), curves: $(DEMO)/curves.png"
	@echo "what each block computed, image by image: open $(DEMO)/masks/index.html"

benchmark: setup
	$(BIN)/pip install --quiet -r requirements/benchmark.txt
	PYTHON=$(BIN)/python dev/benchmark_all.sh work_dirs/benchmark

clean:
	rm -rf build $(DEMO) data/demo_coco

distclean: clean
	rm -rf .venv .venv-* *.egg-info las_mm/_C*.so
