# Each habit is one command; .ci/run and the README call the same ones.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
TYPED := build/typed/camshaft

.PHONY: demo test test-all check format docs soak bench clean

demo: $(READY)  ## train the digits recipe and say where its run directory is
	$(RUN)/python examples/digits.py

test: $(READY)  ## the tests, without those marked slow or gpu
	$(RUN)/pytest -n 2 -m "not slow and not gpu"

test-all: $(READY)  ## every test that this machine can run, then those of `test` on each Python and torch of tox.ini
	$(RUN)/pytest -n 2
	$(RUN)/tox

check: $(READY) $(TYPED)  ## format, lint, types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	MYPYPATH=build/typed $(RUN)/mypy -p camshaft.engine -p camshaft.callbacks -p camshaft.testing -p camshaft.viewer
	MYPYPATH=build/typed $(RUN)/mypy tests examples

format: $(READY)  ## put the code in the one format
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

docs: $(READY) $(TYPED)  ## write the documentation as a site, build/site; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet
	@echo build/site/index.html

soak: $(READY)  ## kill and resume runs of 24 configurations 100 times, and compare them with those that ran through
	$(RUN)/python tests/soak.py --kills 100

bench: $(READY)  ## measure, and write docs/performance.md
	$(RUN)/python benchmarks/run.py

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --editable ".[dev]"
	touch $@

# The folders are installed under one namespace; this is that namespace as a type checker can follow it.
$(TYPED):
	mkdir -p $@
	ln -sfn ../../../engine $@/engine
	ln -sfn ../../../callbacks $@/callbacks
	ln -sfn ../../../testing $@/testing
	ln -sfn ../../../viewer $@/viewer
