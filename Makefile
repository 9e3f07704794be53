# Every target works from a fresh clone: the environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)
ENV := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: demo test test-cpu test-triton test-cubin lint bench smoke docs gpu-check
.NOTPARALLEL:

# --no-build-isolation builds against the very torch that will load the extension.
.venv/installed-%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q "torch>=2.11" setuptools wheel ninja
	$(ENV) $(BIN)/pip install -q --no-build-isolation -e ".[$*]"
	touch $@

demo: .venv/installed-demo
	$(BIN)/fastssl demo --out $$(mktemp -d -t fastssl-demo-XXXX)

test: lint test-cpu test-triton test-cubin

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# A file's tests share what their fixtures train and start, so a file stays in one process.
test-cpu: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --ignore-glob "tests/*_triton.py" --ignore-glob "tests/*_cubin.py"

# The interpreter must be chosen before the kernels are imported, hence a process of its own. It and
# the compiler run on one thread: a process a core.
test-triton: .venv/installed-dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/*_triton.py

test-cubin: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/*_cubin.py

# A selection, in under ten minutes; README's table is made of it.
RESULTS = benchmarks/results/$(shell $(BIN)/python -c "from fastssl.bench.results import machine; print(machine())")
bench: .venv/installed-dev
	$(BIN)/fastssl bench losses sinkhorn sigreg optim augment methods --short --minutes 8.5 \
	  --out $(RESULTS)/bench
	$(BIN)/python benchmarks/tables.py

# A short run of every method must beat random weights by its margin.
smoke: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/smoke.py

# Pages that are made of docstrings and results.
docs: .venv/installed-dev
	$(BIN)/python docs/methods.py
	$(BIN)/python docs/compare.py

# With the active Python and no network: for a machine that has a GPU, torch and a compiler. A call
# takes under nine minutes; PARTS="kernel-tests op-tests", "benchmarks" or "steps" gives it to these.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PARTS)
