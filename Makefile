# Everything runs in .venv, which is made when it is missing and brought up to date when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := .venv-tools
PYTEST := $(BIN)/python -m pytest
export RAY_USAGE_STATS_ENABLED := 0
# Without bytecode, each of the many processes that tests start compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test test-slow test-multihost test-matrix test-families test-cluster-files test-slurm test-gpu methods-table doctor-table image-locks lint types audit bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev,bench]'
	touch $@

# A fresh name each time: a run overwrites nothing.
quickstart: $(STAMP)
	$(BIN)/raytune-ft sweep jobs/quickstart.yaml name=quickstart-$$(date +%Y%m%d-%H%M%S)

# tests/conftest.py says which tests share a process, and which begin first. With more than one thread
# each, processes wait for each other's threads; workers of Ray that have two wait without a loop,
# which would take the core from the thread that they wait for.
SEVERAL := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PYTEST) --dist loadgroup --no-loadscope-reorder

# Three processes keep two cores at work, since some tests wait.
test: $(STAMP)
	$(SEVERAL) -n 3 \
		-m "not slow and not stress and not multihost and not matrix and not families and not slurm and not gpu"

# Two: some of these measure times, and most have several processes of their own.
test-slow: $(STAMP)
	$(SEVERAL) -n 2 -m "(slow or stress) and not multihost"

# Needs root and iproute2; skipped with the reason otherwise.
test-multihost: $(STAMP)
	$(PYTEST) -m multihost -s tests/multihost

# Every file of cluster/ by the tools that read it. SkyPilot has an environment of its own, since its
# many dependencies are not ours; promtool is in a package of Debian. Without them, and without kubectl,
# their tests are skipped with the reason.
test-cluster-files: $(STAMP)
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	-$(TOOLS)/bin/python -m pip install -q skypilot==0.14.1
	-command -v promtool || (cd $(TOOLS) && apt-get download -q prometheus && dpkg -x prometheus_*.deb .)
	$(PYTEST) tests/cluster_files

# On a machine with a GPU; skipped with the reason otherwise.
test-gpu: $(STAMP)
	$(PYTEST) -m gpu -s tests/gpu

# A real Slurm of two nodes. Needs root, iproute2 and Debian's package archive.
test-slurm: $(STAMP)
	$(PYTEST) -m slurm -s tests/slurm

# Every strategy, activation policy, method and family of models; RAYTUNE_FT_MATRIX names a file
# for the table.
test-matrix: $(STAMP)
	$(PYTEST) -m matrix -s

# Every class that transformers has for causal language models; writes the table of docs/models.md.
test-families: $(STAMP)
	RAYTUNE_FT_WRITE=1 $(PYTEST) -m families -s

# The table of docs/methods.md.
methods-table: $(STAMP)
	$(BIN)/python scripts/tables.py methods

# After a change of constraints.txt. TORCH_CPU may be a directory that holds the wheel.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu/torch/
COMPILE := $(BIN)/uv pip compile -q pyproject.toml -c constraints.txt --generate-hashes --no-header --no-annotate \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--extra lm-eval --extra metrics --extra mlflow --extra postgres --extra quantize --extra s3
image-locks: $(STAMP)
	$(BIN)/python -m pip install -q uv==0.13.8
	$(COMPILE) --find-links $(TORCH_CPU) -o cluster/image/cpu.lock
	$(COMPILE) -o cluster/image/cuda.lock

# The findings on docs/doctor.md.
doctor-table: $(STAMP)
	$(BIN)/python scripts/tables.py doctor

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks --implicit-reexport --allow-untyped-calls \
		--allow-subclassing-any --no-warn-return-any --no-warn-unused-ignores

# Dangerous code, secrets in the repository, and known vulnerabilities of the pinned packages, where
# their database can be reached. SECURITY.md says what is accepted.
OSV := https://api.osv.dev/v1/vulns/GHSA-2xpw-w6gg-jr37
audit: $(STAMP)
	$(BIN)/bandit -q -c pyproject.toml -r raytune_ft jobs scripts
	git ls-files -z | xargs -0 sh -c '$(BIN)/detect-secrets-hook --baseline .secrets.baseline "$$@" \
		|| [ $$? = 3 ]' sh  # 3: only the lines of known ones have moved
	@if $(BIN)/python -c "import urllib.request as u; u.urlopen('$(OSV)', timeout=20)" 2> /dev/null; \
	then $(BIN)/pip-audit -s osv --no-deps --disable-pip -r constraints.txt; \
	else echo "osv.dev cannot be reached: known vulnerabilities were not looked up"; fi

bench: $(STAMP)
	$(BIN)/python benchmarks/train_throughput.py

clean:
	rm -rf $(VENV) $(TOOLS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
