# All targets run in .venv next to this file; `make install` creates it and does nothing if it is up to date.
PYTHON ?= python3
BIN := .venv/bin
# Test processes at a time. A file of tests stays in one process, so that its fixtures are made once. The files are
# tested in their order: by default, those with the fewest tests would be last, which take longest.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
STAMP := .venv/.installed

.PHONY: install demo test test-slow chaos bench quality check clean

install: $(STAMP)

# torch is installed first and pinned, so that no later package replaces it with another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/quickstart/demo.py

test: install
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow

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

# The comparison of merge quality: hours on two cores; existing results are kept. See benchmarks/quality/README.md.
quality: install
	$(BIN)/python benchmarks/quality/fine_tune.py
	$(BIN)/python benchmarks/quality/compare.py
	$(BIN)/python benchmarks/quality/sensitivity.py
	$(BIN)/python benchmarks/quality/sensitivity_figure.py benchmarks/quality/sensitivity.png
	$(BIN)/python benchmarks/quality/table.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
