# All tasks of this repository. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check bench docs fuzz fuzz-import

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 19

install: $(STAMP) ## create .venv with unmask and everything that its tests need

# Reinstalls when pyproject.toml or constraints.txt change. The stamp is written last, so a failed installation is repeated.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; hint: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "unmask needs Python 3.11 or later, got $$($(PYTHON) -V 2>&1); hint: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "can't create .venv: this Python has no venv module; hint: apt install python3-venv (Debian)" >&2; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $(STAMP)

demo: install ## pretrain on the English text in every Python installation, then fill masks (a few minutes)
	$(BIN)/unmask demo

test: check ## run the checks and the tests that aren't slow (under five minutes on two cores)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "not slow"

test-slow: install ## run the slow tests: several ranks, servers, a cluster, the pages of the documentation (five minutes)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m slow

check: install ## run ruff, basedpyright and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

docs: install ## build the site of the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

bench: ## time to loss, recipe seed against char, 15 minutes: make bench TEXT=tinyshakespeare.txt
	@test -n "$(TEXT)" || { echo "TEXT is not set; hint: make bench TEXT=path/to/tinyshakespeare.txt" >&2; exit 2; }
	@test -f "$(TEXT)" || { echo "file not found: $(TEXT); hint: make bench TEXT=path/to/tinyshakespeare.txt" >&2; exit 2; }
	@$(MAKE) --no-print-directory install
	$(BIN)/python benchmarks/time_to_loss.py "$(TEXT)"

fuzz: install ## give changed and random input to every reader, and damage every file (hours)
	$(BIN)/python benchmarks/fuzz.py --json benchmarks/results/fuzz.json

fuzz-import: install ## change every key of four small Hugging Face folders, import each, and compare with transformers (minutes)
	$(BIN)/python benchmarks/fuzz_import.py --json benchmarks/results/fuzz_import.json
