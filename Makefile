# Everything a person runs. Python, its packages and tool caches stay in .venv.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

# The demo's ranks: two, on the CPU or on GPUs, or one where there is one GPU. (Without the option, the deepspeed
# launcher takes every GPU by itself.)
RANKS := $(shell gpus=$$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true); [ "$$gpus" = 1 ] && echo 1 || echo 2)
LAUNCH := $(BIN)/deepspeed --num_accelerators $(RANKS)

.PHONY: help demo demo-images demo-text test test-slow wheelhouse check fix clean
help:
	@echo "make demo         install, train on real digits on 2 CPU ranks, sample, score (about 10 minutes)"
	@echo "make demo-images  after it: the same training straight from images, compared with it (2 minutes)"
	@echo "make demo-text    after it: digits drawn from words, and words written of digits, by one model (10 minutes)"
	@echo "make test         install, run the CPU test suite (about 12 minutes)"
	@echo "make test-slow    the tests that take minutes each (about 15 minutes)"
	@echo "make wheelhouse PYTHON=3.12  wheels for machines without a network, with that Python and torch"
	@echo "make check        format, lint, types, import contract"
	@echo "make fix          format and fix what can be fixed"
	@echo "make clean        remove .venv and the demo's data and run"

$(READY): setup.py constraints.txt
	@echo "[make] creating $(VENV) and installing (4 to 5 minutes, 8 GB: torch comes with CUDA)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --progress-bar off --constraint constraints.txt --editable ".[dev,demo]"
	@touch $(READY)

FILES := data/mnist-files
IMAGES := data/mnist-images
LATENTS := data/mnist-latents
HELD_OUT := data/mnist-held-out
RUN := runs/demo
CAPTIONED := data/mnist-captioned

demo: $(READY)
	$(BIN)/python tools/example_images.py mnist --out $(FILES) --held-out $(HELD_OUT)-files
	$(BIN)/python tools/make_shards.py $(FILES) --out $(IMAGES) --size 32 --grey --images-per-shard 500
	$(BIN)/python tools/make_shards.py $(HELD_OUT)-files --out $(HELD_OUT) --size 32 --grey
	$(LAUNCH) tools/encode_latents.py $(IMAGES) --autoencoder configs/autoencoders/digits --out $(LATENTS) --no-mirror
	$(LAUNCH) cfpretrain/train.py --config configs/demo.yaml
	$(LAUNCH) tools/report.py $(RUN) --images $(IMAGES) --held-out $(HELD_OUT)

# The demo's training once more, from its image shards, for a minute: `num_steps` stays, so that the learning rate is the
# same at each step. Losses are equal bit by bit where the machine is the one that encoded the latents, in batches of as
# many (32). Else the last bits differ, and the difference grows: over 50 steps to 2e-6 by another order of summation
# alone (1 rank for 2, AVX2 for AVX512), to 5e-6 where latents differ by roundings of float16 too, and over 100 steps to
# 2e-2. The bound is 20 times the 5e-6. Other samples differ by 4e-2 at the first step, and where half of the same ones are
# mirrored, the losses differ by 4e-4 within 10 steps and by 2e-2 within 30.
demo-images: $(RUN)/summary.json $(READY)
	$(LAUNCH) cfpretrain/train.py --config configs/demo.yaml data.shards=$(IMAGES) run.folder=$(RUN)-images \
	  train.max_train_seconds=60 sample.every_steps=0
	$(BIN)/python tools/compare_runs.py $(RUN) $(RUN)-images --steps 50 --tolerance 1e-4

# The demo with texts: digits and variants of them with captions that are true by measurement, in both directions. The
# demo's own images are those of the classifier that judges what is drawn.
demo-text: $(RUN)/summary.json $(READY)
	$(BIN)/python tools/captioned_digits.py --out $(CAPTIONED)-files
	$(BIN)/python tools/make_shards.py $(CAPTIONED)-files/train.csv --out $(CAPTIONED)-images --size 32 --grey
	$(BIN)/python tools/make_shards.py $(CAPTIONED)-files/held-out.csv --out $(CAPTIONED)-held-out --size 32 --grey
	test -f $(CAPTIONED)-tokenizer.json || \
	  $(BIN)/python tools/train_tokenizer.py $(CAPTIONED)-images --out $(CAPTIONED)-tokenizer.json --size 600
	$(LAUNCH) tools/encode_latents.py $(CAPTIONED)-images --autoencoder configs/autoencoders/digits \
	  --out $(CAPTIONED)-latents --no-mirror
	$(LAUNCH) cfpretrain/train.py --config configs/demo-text.yaml
	$(LAUNCH) tools/text_report.py $(RUN)-text --files $(CAPTIONED)-files --images $(IMAGES) \
	  --held-out $(CAPTIONED)-held-out

$(RUN)/summary.json:
	@echo "[make] expected the demo's complete run in $(RUN): run \`make demo\` first, to its end" >&2; exit 2

# Of three processes on two cores one often waits. A file's fixtures are made once, by one of them; tests/conftest.py puts
# the files with most to do first.
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Of tests that take minutes, whoever is free takes the next.
test-slow: $(READY)
	$(BIN)/python -m pytest -n 3 --dist worksteal -m slow

# Of the packages that it collects it needs none here, nor torch.
wheelhouse:
	python3 -m venv $(VENV)/wheelhouse
	$(VENV)/wheelhouse/bin/pip install --quiet --constraint constraints.txt packaging
	rm -rf wheelhouse-$(PYTHON)
	$(VENV)/wheelhouse/bin/python tools/make_wheelhouse.py --python $(PYTHON) --out wheelhouse-$(PYTHON)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck -x cluster/*.sh cluster/*.sbatch

fix: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(RUN) $(RUN)-images $(RUN)-text $(CAPTIONED)-* $(FILES) $(IMAGES) $(LATENTS) $(HELD_OUT) $(HELD_OUT)-files
