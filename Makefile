# Two commands do everything: `make demo` sets up and runs both libraries end to end; `make test` sets up and checks them.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN    := .venv/bin
# LIDC-IDRI-0001, for the pictures that need a real CT
CT     ?= ../shared/data/lidc-idri-0001
# of bench-training: OPTIONS="--stages 1 --batch 2 --precision no" is for a preset that is too much for this machine
SHARDS ?= demo/shards
PRESET ?= toy
PACKAGES := packages/drrgen packages/svdrr
SOURCES  := $(shell find packages -name '*.py') docs/figures/demo.py

.PHONY: demo test lint figures bench bench-pipeline bench-learning bench-gpu bench-training sizes help

demo: demo/report.md  ## synthetic patients, their views, a trained toy model, a picture and a table (CPU, 3 to 4 minutes)
	@cat demo/report.md
	@echo "Picture: $(CURDIR)/demo/demo.png"

demo/report.md: .venv/ready $(SOURCES)
	$(BIN)/python docs/figures/demo.py demo

test: .venv/ready  ## every test that this machine can run, a few at once
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

lint: .venv/ready  ## format, lint, types, import directions
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

figures: demo/report.md  ## make the pictures and the table of the documentation again
	$(BIN)/python docs/figures/geometry.py docs/img
	[ ! -d $(CT) ] || $(BIN)/python docs/figures/body.py $(CT) docs/img
	[ ! -d $(CT) ] || $(BIN)/python docs/figures/nodule.py $(CT) docs/img
	[ ! -d $(CT) ] || $(BIN)/python docs/figures/physics.py $(CT) docs/img
	[ ! -d $(CT) ] || ! command -v chromium > /dev/null || $(BIN)/python docs/figures/view.py $(CT) docs/img
	cp demo/demo.png docs/img/demo.png
	$(BIN)/python docs/figures/readme.py demo/report.md README.md

bench: .venv-bench/ready  ## time and error of the projectors beside RTK, plastimatch, nanodrr, DiffDRR (own venv, 23 minutes)
	.venv-bench/bin/python -m tests.benchmarks.projectors $(CT) --out bench --document docs/benchmarks.md
	cp bench/benchmarks.png docs/img/benchmarks.png

bench-pipeline: .venv/ready  ## what render does with its time, compression beside h5py, the cost of LIDC-IDRI (3 minutes)
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.pipeline $(wildcard $(CT) $(CT)/../lung-dx-a0001/kernelB-*) --document docs/pipeline.md --costs docs/how-to/get-lidc.md

bench-gpu: .venv/ready  ## the cuda projector on this machine's GPU, in numbers; nanodrr too, if it is installed
	PYTHONPATH=. $(BIN)/python tests/benchmarks/cuda.py $(wildcard $(CT))

bench-training: .venv/ready  ## what a step of PRESET's training costs here, by real steps on SHARDS; GPU or CPU (minutes)
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.training $(SHARDS) --preset $(PRESET) $(OPTIONS) --document docs/training.md

bench-learning: .venv/ready  ## which design learns most in the same time, on SHARDS of synthetic patients (an hour of one core)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.benchmarks.learning $(SHARDS) --out bench/learning --minutes 3 --document docs/training.md $(OPTIONS)

sizes: .venv/ready  ## parameters, memory, FLOPs and estimated hours of the presets, counted (a minute)
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.model_sizes --document docs/training.md

help:  ## list these commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/ready: pyproject.toml constraints.txt $(PACKAGES:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev $(PACKAGES:%=--editable %)
	@touch $@

# what is compared with is no part of the development venv; what cannot be installed is left out of the tables
.venv-bench/ready: constraints.txt tests/benchmarks/peers.txt packages/drrgen/pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt matplotlib --editable packages/drrgen
	@grep -v '^#' tests/benchmarks/peers.txt | while read -r peer; do \
	  .venv-bench/bin/python -m pip install --quiet --constraint constraints.txt $$peer || echo "not installed: $$peer"; done
	@touch $@
