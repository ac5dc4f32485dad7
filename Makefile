# Every target works on a fresh machine with Python 3.11–3.13 (with venv) and make: it first creates .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long lint bench lock clean

demo: .venv/installed  ## all stages on digits: images, tokenizer, cache, model, sweeps, evaluation, report
	$(BIN)/mar quickstart

test: .venv/installed  ## the test suite, in two processes
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-long: .venv/installed  ## tests that take minutes each: killed and hung workers, node failures, failing S3
	$(BIN)/python -m pytest -q -m long

lint: .venv/installed  ## ruff, import-linter and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: .venv/installed  ## benchmarks that need no files and no finished run
	@set -e; for script in cache loader model training; do echo "== $$script"; $(BIN)/python -m benchmarks.$$script; done

lock:  ## pin all dependencies again (versions and hashes)
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q uv; }
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --upgrade --generate-hashes \
		--no-emit-index-url --no-header --quiet --output-file requirements.lock

clean:  ## remove what make created, except runs/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit(f"Python 3.11 to 3.13 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
