# All targets run in .venv next to this file; `make install` creates it and does nothing if it is up to date.
PYTHON ?= python3
BIN := .venv/bin
# Test processes at a time.
WORKERS ?= 2
# A file of tests stays in one process, so that its fixtures are made once. The files are tested in their order: by
# default, those with the fewest tests would be last, which take longest. Compiled modules are kept even where the
# environment says otherwise, as tests start many processes.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
# The files with tests of a marker, those that start Ray first. Each process would collect all other files in vain.
FOLDERS = tests/cluster tests/end_to_end tests/parity tests/actors tests/engine tests/test_*.py
MARKED = $(shell grep -rlE --include='test_*.py' $(1) $(FOLDERS))
STAMP := .venv/.installed
PIP = $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: install demo test test-slow test-thorough mergekit-parity fusion-bench-parity chaos bench gpu-check gpu-check-ray gpu-check-dry \
	quality quality-b vision-quality check clean

install: $(STAMP)

# torch is installed first and pinned, so that no later package replaces it with another build. A newer pip than that of
# Python 3.11 shows what it unpacks, too.
$(STAMP): pyproject.toml constraints.txt
	@echo "making an environment in .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade "pip>=25.1"
	@echo "installing torch, the largest part"
	@$(PIP) -c constraints.txt torch
	@echo "installing everything else, such as Ray and transformers"
	@$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

demo: install
	@$(BIN)/python examples/quickstart/demo.py

test: install
	$(PYTEST) -n $(WORKERS) -m "not slow and not thorough"

test-slow: install
	$(PYTEST) -n $(WORKERS) -m "slow and not thorough" $(call MARKED,slow)

# The rest of the tests with many parameters, and long tests like others that CI has. Not a part of CI.
test-thorough: install
	$(PYTEST) -n $(WORKERS) -m thorough $(call MARKED,'thorough|cases')

# 113 configs that people published, with tiny models, through mergekit and through this engine: ten minutes on a core,
# half of it the second time. ARGS: parts of the names of configs, and --record to store the verdicts for the tests.
mergekit-parity: install
	PYTHONPATH=.:tests $(BIN)/python -m parity $(ARGS)

# The methods that FusionBench has, too, beside its own code; five minutes. FUSION_BENCH: a Python that has it; see
# benchmarks/README.md.
FUSION_BENCH ?= python3
fusion-bench-parity: install
	PYTHONPATH=. $(BIN)/python benchmarks/fusion_bench_parity.py --python $(FUSION_BENCH)

# Kills every kind of process and node in every phase of a merge; 20 minutes on two cores.
chaos: install
	$(BIN)/python tests/chaos.py

# Half an hour on two cores; times are only meaningful on a quiet machine. See benchmarks/README.md.
bench: install
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/trainer_memory.py
	$(BIN)/python benchmarks/traffic.py
	$(BIN)/python benchmarks/scaling.py check
	$(BIN)/python benchmarks/weight_space.py

# On a machine with a GPU, with a Python that has torch for CUDA; no network. Six minutes.
GPU_PYTHON ?= python3
CHECK_PATH = PYTHONPATH="$(CURDIR):$(CURDIR)/tests:$(CURDIR)/benchmarks"

gpu-check:
	$(CHECK_PATH) $(GPU_PYTHON) -m gpu_check

# The part of the checks that needs Ray; two minutes.
gpu-check-ray:
	$(CHECK_PATH) $(GPU_PYTHON) -m gpu_check.on_ray

# The same code on a CPU, with small models.
gpu-check-dry: install
	$(CHECK_PATH) $(BIN)/python -m gpu_check --device cpu --small

# The comparison of merge quality: hours on two cores; existing results are kept. See benchmarks/quality/README.md.
quality: install
	$(BIN)/python benchmarks/quality/fine_tune.py
	$(BIN)/python benchmarks/quality/compare.py
	$(BIN)/python benchmarks/quality/sensitivity.py
	$(BIN)/python benchmarks/quality/sensitivity_figure.py benchmarks/quality/sensitivity.png
	$(BIN)/python benchmarks/quality/table.py

# The same on skills that no option was chosen on, once per release: hours, as above.
quality-b: install
	$(BIN)/python benchmarks/quality/bench_b.py
	$(BIN)/python benchmarks/quality/table_b.py

# The same for a model that takes pictures; an hour on a core. See benchmarks/vision/README.md.
vision-quality: install
	$(BIN)/python benchmarks/vision/train.py
	$(BIN)/python benchmarks/vision/compare.py
	$(BIN)/python benchmarks/vision/compare.py --adapters

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test test-slow test-thorough

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
