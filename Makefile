# Everything a person does with this repository, one word each. `make` alone lists the words.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

install: $(STAMP) ## .venv with unmask and all that its tests need; does nothing when that stands

# Made anew only when what it depends on has changed; the stamp comes last, so a broken installation is tried again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: name one, make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "unmask needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) -V 2>&1): make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "can't make .venv: this Python lacks its venv module (Debian: apt install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $(STAMP)

demo: install ## pretrain on the English in every Python, a few minutes, then fill masks
	$(BIN)/unmask demo

test: check ## the checks and all tests, under five minutes on two cores
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

check: install ## style, types and floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

bench: ## time to loss, the seed recipe against char: TEXT=tinyshakespeare.txt, a quiet machine, a quarter of an hour
	@test -n "$(TEXT)" || { echo "no text to race on: name it, make bench TEXT=path/to/tinyshakespeare.txt" >&2; exit 2; }
	@test -f "$(TEXT)" || { echo "there is no file $(TEXT): make bench TEXT=path/to/tinyshakespeare.txt" >&2; exit 2; }
	@$(MAKE) --no-print-directory install
	$(BIN)/python benchmarks/time_to_loss.py "$(TEXT)"
