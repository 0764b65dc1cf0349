# `make demo` and `make test` need Python 3.10 to 3.13 and nothing else. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-export.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Each step is skipped where its result is there already, so that an interrupted demo goes on.
demo: .venv/installed
	$(BIN)/python demo_data.py data/demo_images --scale 0.15
	test -f data/demo/dataset.json || \
	  $(BIN)/python prepare_dataset.py folders data/demo_images data/demo --head-min 34 --tail-max 14
	$(BIN)/python run_all.py --data-root data/demo --output runs/demo --resume --init none \
	  --image-size 64 --batch-size 16 --epochs 9 --schedule one-cycle --lr 0.01
	@echo "the drawn ships: data/demo_images/sheet.png"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv data/demo data/demo_images runs/demo
