# `make demo` and `make test` need Python 3.10 to 3.13 and nothing else. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin
# Tests run in so many processes of one thread each.
TEST_JOBS ?= 2
# Memory in huge pages, and kept: on a virtual machine with fragmented memory a training step is several times faster.
export GLIBC_TUNABLES ?= \
  glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592

.PHONY: demo demo-detection demo-lad demo-rotated test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-export.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Each step is skipped where its result is there already, so that an interrupted demo goes on.
demo: .venv/installed
	$(BIN)/python -m demo.draw_ships data/demo_images --scale 0.15 --test-per-class 24
	test -f data/demo/dataset.json || \
	  $(BIN)/python prepare_dataset.py folders data/demo_images data/demo --head-min 34 --tail-max 14
	$(BIN)/python run_all.py --data-root data/demo --output runs/demo --resume --init none \
	  --image-size 64 --batch-size 16 --epochs 9 --schedule one-cycle --lr 0.01
	@echo "the drawn ships: data/demo_images/sheet.png"

SCENES = --train data/demo_scenes/train.json --test data/demo_scenes/test.json --resume --init none --depth 18 \
  --channels 64 --tower-convs 2 --short 192 --long 192 --epochs 12 --lr-steps 10,12 --batch-size 4 --lr 0.04 --clip 35 \
  --warmup-steps 60 --workers 0
# A teacher trains twice as long, from other random weights: from the same ones its student's features come out alike.
TEACHER = --epochs 24 --lr-steps 19,23 --seed 2

demo-detection: .venv/installed
	$(BIN)/python -m demo.draw_scenes data/demo_scenes --size 192
	$(BIN)/python -m detection.train_gfl $(SCENES) $(TEACHER) --output runs/demo_detection/teacher
	$(BIN)/python -m detection.train_gfl $(SCENES) --output runs/demo_detection/gfl
	$(BIN)/python -m detection.train_ld $(SCENES) --imitation finegrained --output runs/demo_detection/ld \
	  --teacher runs/demo_detection/teacher/final.pt
	$(BIN)/python -m detection.compare teacher=runs/demo_detection/teacher alone=runs/demo_detection/gfl \
	  LD=runs/demo_detection/ld
	@echo "detections against ground truth: runs/demo_detection/ld/detections.png"

demo-lad: .venv/installed
	$(BIN)/python -m demo.draw_scenes data/demo_scenes --size 192
	$(BIN)/python -m detection.train_paa $(SCENES) --anchor-size 0.5 $(TEACHER) --output runs/demo_lad/teacher
	$(BIN)/python -m detection.train_paa $(SCENES) --anchor-size 0.5 --output runs/demo_lad/paa
	$(BIN)/python -m detection.train_lad $(SCENES) --anchor-size 0.5 --output runs/demo_lad/lad \
	  --teacher runs/demo_lad/teacher/final.pt
	$(BIN)/python -m detection.compare teacher=runs/demo_lad/teacher alone=runs/demo_lad/paa LAD=runs/demo_lad/lad
	$(BIN)/python -m detection.show_assignment data/demo_scenes/test.json --weights runs/demo_lad/paa/final.pt \
	  runs/demo_lad/teacher/final.pt --output runs/demo_lad/assignment.png
	@echo "positive anchors of the student alone and of its teacher: runs/demo_lad/assignment.png"

ORIENTED = --train data/demo_oriented/train --test data/demo_oriented/test --resume --init none --depth 18 \
  --channels 64 --tower-convs 1 --anchor-size 0.5 --short 192 --long 192 --epochs 12 --lr-steps 10,12 --batch-size 2 \
  --lr 0.03 --clip 5 --warmup-steps 60 --workers 0

demo-rotated: .venv/installed
	$(BIN)/python -m demo.draw_scenes data/demo_oriented --oriented --size 192
	$(BIN)/python -m detection.train_rotated $(ORIENTED) $(TEACHER) --output runs/demo_rotated/teacher
	$(BIN)/python -m detection.train_rotated $(ORIENTED) --output runs/demo_rotated/alone
	$(BIN)/python -m detection.train_rotated_ld $(ORIENTED) --output runs/demo_rotated/ld \
	  --teacher runs/demo_rotated/teacher/final.pt
	$(BIN)/python -m detection.compare teacher=runs/demo_rotated/teacher alone=runs/demo_rotated/alone \
	  LD=runs/demo_rotated/ld
	@echo "detections against ground truth: runs/demo_rotated/ld/detections.png"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy common
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

clean:
	rm -rf .venv data/demo data/demo_images data/demo_scenes data/demo_oriented runs/demo runs/demo_detection \
	  runs/demo_lad runs/demo_rotated
