# `make` lists what there is to do.
PYTHON ?= python3
BIN := .venv/bin
LOG := .venv/install.log
NPU := .venv-npu/bin
EMULATOR := $(if $(wildcard /dev/davinci0),,$(CURDIR)/.venv-npu/fakecann)
BUILD_EMULATOR = $(if $(EMULATOR),$(NPU)/python kernels/fakecann/build.py $(EMULATOR))
WITH_NPU = $(if $(EMULATOR),LD_LIBRARY_PATH=$(EMULATOR):$$LD_LIBRARY_PATH) PATH=$(CURDIR)/$(NPU):$$PATH
ON_NPU = $(if $(filter npu,$(DEVICE)),$(WITH_NPU))
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test test-npu test-triton lab notebooks pictures ui serve bench bench-quick
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(if $(ON_NPU),.venv-npu/installed,.venv/installed-core) ## raw text to a promoted model in one go, about 10 minutes; DEVICE=npu: on Ascend
	@$(if $(ON_NPU),$(BUILD_EMULATOR))
	@$(ON_NPU) python -m pipelines.cli demo

test: .venv/installed-dev ## the whole test suite
	@ruff check --quiet . && ruff format --check --quiet . \
	  && OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-npu: .venv-npu/installed ## tests through torch_npu: on Ascend cards where there are some, else emulated on the CPU
	@$(BUILD_EMULATOR)
	@$(WITH_NPU) python -m pytest tests/npu

test-triton: .venv-triton/installed ## tests of the Triton kernels, by Triton's interpreter and its compiler, on the CPU
	@OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile tests/triton_kernels

lab: .venv/installed-lab ## JupyterLab on 127.0.0.1, with the notebooks, git, MLflow and DVC's plots
	@JUPYTER_CONFIG_PATH=notebooks/.jupyter jupyter lab

notebooks: .venv/installed-lab ## execute all notebooks, pages in notebooks/pages
	@cd notebooks && dvc repro --quiet

pictures: .venv/installed-pictures ## the pictures of the README, from this project as it is
	@python -m pipelines.notebooks.pictures

ui: .venv/installed-core ## the MLflow UI on 127.0.0.1
	@shovel ui

serve: .venv/installed-core ## the champion behind an OpenAI-compatible endpoint on 127.0.0.1
	@shovel serve

bench: .venv-bench/installed ## every target against its peers, about 20 minutes on a quiet machine; renews the table in README.md
	@.venv-bench/bin/python kernels/bench/run.py

bench-quick: .venv-bench/installed ## the same in three minutes: smaller shapes, fewer peers, nothing written
	@.venv-bench/bin/python kernels/bench/run.py --quick

# Installation: torch first, so that nothing else chooses its build; then the rest against constraints.txt, and beside it
# the kernels of the CPU are compiled, for which their first use would else wait.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11"; exit 2; }
	@echo "install    .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

define install
	@echo "install    $(1)"
	@start=$$(date +%s); ( $(or $(3),$(BIN))/pip install --disable-pip-version-check $(2) ) >>$(LOG) 2>&1 \
	  || { tail -n 3 $(LOG); echo "install    failed; the whole log is $(CURDIR)/$(LOG)"; exit 1; }; \
	  echo "install    done in $$(($$(date +%s) - start)) s"
endef

.venv/installed-torch: constraints.txt | $(BIN)/pip
	$(call install,torch,torch==2.13.0 -c constraints.txt)
	@touch $@

.venv/installed-core: .venv/installed-torch pyproject.toml constraints.txt
	@PYTHONPATH=kernels nice $(BIN)/python -c 'from moe_kernels.cpu import library; library.load()' >>$(LOG) 2>&1 &
	$(call install,pipeline: DVC MLflow Great Expectations transformers,-c constraints.txt -e .)
	@touch $@

.venv/installed-dev: .venv/installed-core
	$(call install,tests: pytest hypothesis ruff,-c constraints.txt -e .[dev])
	@touch $@

# Environments on top of .venv, which see all of it. torch_npu: with it in .venv `import torch` would fail without CANN.
# triton-ascend: the smallest Triton there is (54 MB), nothing of NVIDIA's in it, and its interpreter and compiler need no
# card; it imports pybind11 without asking for it. torchtitan, without what it asks for but does not use here: its requirements would replace other packages.
define on_top_of_venv
	@$(PYTHON) -m venv $(1)
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > $$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/shovel.pth
endef

.venv-npu/installed: .venv/installed-dev
	$(call on_top_of_venv,.venv-npu)
	$(call install,.venv-npu: torch_npu,--no-deps -c constraints.txt torch-npu,$(NPU))
	@touch $@

.venv-triton/installed: .venv/installed-dev
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "triton-ascend is made for Python 3.11; rebuild .venv: rm -r .venv; make PYTHON=python3.11 test-triton"; exit 2; }
	$(call on_top_of_venv,.venv-triton)
	$(call install,.venv-triton: triton-ascend,--no-deps -c constraints.txt triton-ascend pybind11,.venv-triton/bin)
	@touch $@

.venv-bench/installed: .venv/installed-core
	$(call on_top_of_venv,.venv-bench)
	$(call install,.venv-bench: torchtitan,--no-deps -c constraints.txt torchtitan spmd-types tyro docstring-parser,.venv-bench/bin)
	@touch $@

.venv/installed-lab: .venv/installed-core
	$(call install,JupyterLab,-c constraints.txt -e .[lab])
	@touch $@

.venv/installed-pictures: .venv/installed-lab
	$(call install,pictures: playwright,-c constraints.txt -e .[pictures])
	@touch $@
