PYTHON ?= python3
BIN := .venv/bin
# Threads that wait should sleep: spinning ones make a busy machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE
STAMP := .venv/.installed
# Real vocabularies for the tests; only their data files are used, so none of their dependencies.
TOKENIZERS := mistral-common==1.13.1 qwen-agent==0.0.34

.PHONY: help venv demo test lint docs-check dist-check coverage mutation reliability ladder bench clean

help:
	@echo "make demo         small chat models: distil, merge, evaluate (offline once installed)"
	@echo "make test         run the tests"
	@echo "make lint         ruff and mypy"
	@echo "make docs-check   run every command and code block of the README and docs/"
	@echo "make dist-check   build wheel and sdist, install them elsewhere, run every command"
	@echo "make coverage     run the tests, list the lines and branches that none of them reaches"
	@echo "make mutation     change the arithmetic one place at a time, list what no test detects"
	@echo "make reliability  crashes, bad inputs, races, memory: writes docs/reliability.md"
	@echo "make ladder       measure the papers' claims in the small, about an hour"
	@echo "make bench        measure speed and memory, as ratios"
	@echo "make clean        remove .venv, runs/ and caches"

venv: $(STAMP)

# A .venv that is there but broken or half installed has no stamp, and is installed again.
$(STAMP): pyproject.toml setup.py fusechat_autoload.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fusechat needs Python >= 3.11 (TRL does): make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TOKENIZERS)
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/quickstart/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
	$(BIN)/python -m tests.merge.inputs.test_fuzz_headers 1000000 0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs-check: $(STAMP)
	$(BIN)/python -m qa.docs_check

dist-check: $(STAMP)
	$(BIN)/python -m qa.dist_check

coverage: $(STAMP)
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

reliability: $(STAMP)
	$(BIN)/python -m qa.reliability.run

mutation: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/python -m qa.mutation --jobs 2

ladder: $(STAMP)
	$(BIN)/python examples/reproduction/ladder.py --scale cpu

bench: bench-merge bench-score bench-align bench-train

bench-merge: BENCH := small
bench-%: $(STAMP)
	$(BIN)/python benchmarks/bench_$*.py $(BENCH)

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
