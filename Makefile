# `make demo` and `make test` work in a fresh clone: they create .venv and install what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
DEMO_DIR ?= s2q-demo
# Bytecode is compiled at the first import of a module, not of all that is installed, and kept whatever the environment says.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-emulated test-faults test-gpu bench-cpu bench-cpu-kinds bench-cpu-steps bench-gpu lint format docs clean

demo: $(READY)
	$(BIN)/s2q demo -o $(DEMO_DIR) --overwrite

# The quick tests, 7 minutes on 2 cores: a process a core, each with one thread (tests/conftest.py). ALL=1 adds the slow ones
# and those on emulated GPUs.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
test: $(READY)
	@command -v chromium > /dev/null || echo "No chromium: tests of pages in a browser are skipped (apt-get install chromium)"
	$(PYTEST) $(if $(ALL),-m "not gpu and not vbench and not faults")
	$(if $(ALL),@$(MAKE) --no-print-directory test-emulated)

# The GPU path on two emulated GPUs; see tests/emulation/README.md.
test-emulated: $(READY)
	S2Q_EMULATED_GPUS=1 $(PYTEST) -m gpu tests/emulation

# The long form of the fault suite, about an hour; writes its counts to benchmarks/results/reliability.json.
test-faults: $(READY)
	$(PYTEST) -m faults

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# Each line takes some minutes. After an interruption the same command skips what the file already has.
BENCH := benchmarks/results/bench
BENCH_OPS := linear activation_path gemm attention_colsum
BENCH_MODELS := cogvideox-2b cogvideox-5b hunyuanvideo ltx-2b wan-1.3b wan-14b
bench-cpu: BENCH_RUN = $(BIN)/s2q bench --device cpu --seconds 6 -r s2q-w4a6,s2q-plus-w4a6 -o $(BENCH)/cpu.json
bench-gpu: BENCH_OPS += int8_attention
bench-gpu: BENCH_RUN = $(BIN)/s2q bench --device cuda -r s2q-w4a6,s2q-w4a4,s2q-plus-w4a6 -o $(BENCH)/gpu.json
bench-cpu bench-gpu: $(READY)
	@for op in $(BENCH_OPS); do $(BENCH_RUN) --ops $$op --json > /dev/null || exit; done
	@for model in $(BENCH_MODELS); do \
		$(BENCH_RUN) -m synthetic:$$model --ops denoising_step --json > /dev/null || exit; done
	@$(BENCH_RUN) -m synthetic:cogvideox-2b --ops calibration_block --json > /dev/null
	@$(BENCH_RUN) --ops denoising_step,calibration_block --backend auto,fastest

# Whole linears and the embedded step in one thread, with all instructions of this CPU and, where these include VNNI, limited
# to AVX2. Then a step of distillation of three recipes. Takes minutes; always measures again.
VNNI = $(shell grep -m1 -o avx512_vnni /proc/cpuinfo 2> /dev/null)
OWN = $(if $(VNNI),,-no-vnni)
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
KINDS := s2q-w4a8,s2q-w4a6,s2q-w4a4,s2q-plus-w4a8,s2q-table-w4a8
LEARN := s2q-w4a6,s2q-plus-w4a6,q-vdit-w4a6
KINDS_RUN = OMP_NUM_THREADS=1 $(1) $(BIN)/s2q bench --device cpu --again --repeats 5 --seconds 4 \
	-o $(BENCH)/cpu-one-thread$(2).json --json -r
bench-cpu-steps: $(READY)
	@for model in $(BENCH_MODELS); do OMP_NUM_THREADS=1 $(BIN)/s2q bench --device cpu --again --seconds 6 \
		-r s2q-w4a6,s2q-plus-w4a6,s2q-table-w4a8 -o $(BENCH)/cpu-steps.json \
		-m synthetic:$$model --ops denoising_step --json > /dev/null || exit; done
bench-cpu-kinds: $(READY)
	@$(call KINDS_RUN,,$(OWN)) $(KINDS) --ops linear -m synthetic:cogvideox-5b > /dev/null
	@$(call KINDS_RUN,,$(OWN)) $(KINDS) --ops denoising_step --backend auto,fastest > /dev/null
	@test -z "$(VNNI)" || $(call KINDS_RUN,$(AVX2),-avx2) $(KINDS) --ops linear -m synthetic:cogvideox-5b > /dev/null
	@test -z "$(VNNI)" || $(call KINDS_RUN,$(AVX2),-avx2) $(KINDS) --ops denoising_step --backend auto,fastest > /dev/null
	@$(call KINDS_RUN,,$(OWN)) $(LEARN) --ops calibration_block -m shapes-cogvideox > /dev/null
	@$(call KINDS_RUN,,$(OWN)) $(LEARN) --ops calibration_block -m synthetic:cogvideox-2b > /dev/null

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site in site/; a warning is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf site $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache $(DEMO_DIR)

# torch is installed first and separately, so pip can choose a local CPU build.
$(READY): pyproject.toml constraints.txt
	@echo "Installing what is missing into $(VENV); the first time this takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(READY)

# MkDocs, in half a minute.
$(DOCS_READY): pyproject.toml constraints.txt | $(READY)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $(DOCS_READY)
