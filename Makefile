# `make demo` and `make test` need Python 3.10 to 3.13 and nothing else. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed
	@echo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv data/demo data/demo_images runs/demo
