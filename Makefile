# Everything runs in .venv, which is made when it is missing and brought up to date when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install quickstart test test-slow test-multihost test-matrix test-families methods-table doctor-table lint types bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev,bench]'
	touch $@

# A fresh name each time: a run overwrites nothing.
quickstart: $(STAMP)
	$(BIN)/raytune-ft sweep jobs/quickstart.yaml name=quickstart-$$(date +%Y%m%d-%H%M%S)

# tests/conftest.py says which tests share a process, and which begin first. With more than one
# thread each, the processes wait for each other's threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadgroup --no-loadscope-reorder \
		-m "not slow and not stress and not multihost and not matrix and not families"

test-slow: $(STAMP)
	$(PYTEST) -m "(slow or stress) and not multihost"

# Needs root and iproute2; skipped with the reason otherwise.
test-multihost: $(STAMP)
	$(PYTEST) -m multihost -s tests/multihost

# Every strategy, activation policy, method and family of models; RAYTUNE_FT_MATRIX names a file
# for the table.
test-matrix: $(STAMP)
	$(PYTEST) -m matrix -s

# Every class that transformers has for causal language models; writes the table of docs/models.md.
test-families: $(STAMP)
	RAYTUNE_FT_WRITE=1 $(PYTEST) -m families -s

# The table of docs/methods.md.
methods-table: $(STAMP)
	$(BIN)/python scripts/methods_table.py

# The findings on docs/doctor.md.
doctor-table: $(STAMP)
	$(BIN)/python scripts/doctor_table.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/train_throughput.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
