# Everything a newcomer runs. Needs GNU make and Python 3.10 to 3.13, nothing else:
# each target makes `.venv` and installs what it needs, and does so again only when
# pyproject.toml or constraints.txt change.

# A version manager's shim may exist without the Python behind it: ask it to run.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# The checkpoints that the demo and the benchmarks share, 3.6 GB when both are there.
export TL_FASTLOAD_BENCH_CACHE ?= $(CURDIR)/.cache/checkpoints
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

PROPERTIES := $(shell grep -lr --include="test_*.py" "^@given" tests)

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo demo-quick test test-fast explore test-slow test-gpu lint format types fuzz bench gpu-report gpu-wheels notebooks notebooks-check docs docs-look release-check embedded-model clean
# Other versions of the libraries, each in a virtual environment of its own; see README.md.
ENVIRONMENTS := tl4 tl40 tl2 tl216 old sae
.PHONY: parity parity-current $(ENVIRONMENTS:%=parity-%) $(ENVIRONMENTS:%=bench-%) $(ENVIRONMENTS:%=demo-%)

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(BASE) ## make .venv with the package in it

install-dev: $(DEV) ## the same, with the test and lint tools

demo: $(BASE) ## load the embedded model, then compare lean with stock loading
	$(BIN)/python -m demo.demo

demo-quick: $(BASE) ## the demo's first half: the embedded model alone
	$(BIN)/python -m demo.demo --quick

# The same where another TransformerLens is installed, for instance `make demo-tl4`: the Bridge.
$(ENVIRONMENTS:%=demo-%): demo-%: .venv-%/.installed
	.venv-$*/bin/python -m demo.demo --quick

test: lint types test-fast ## ruff, mypy, and every test that is neither slow nor needs a GPU

# One thread a worker: the models are tiny, and more threads than cores only wait.
test-fast: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not slow"

# Ten runs, each with random examples; one that fails is printed, and kept for the next time.
explore: $(DEV) ## the property tests with other examples than always
	for run in 1 2 3 4 5 6 7 8 9 10; do TL_FASTLOAD_EXAMPLES=explore OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) $(PROPERTIES) || exit 1; done

test-slow: $(DEV) ## the tests that are heavy in time or memory, one at a time
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(DEV) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

parity: parity-current $(ENVIRONMENTS:%=parity-%) ## the parity suite, with all versions of the libraries

# Kept apart from `test`: it counts what it skips.
# Other test files are not even imported: what they need is not installed everywhere.
PARITY_FILES := $(shell grep -lr --include="test_*.py" "pytest.mark.parity" tests)
PARITY := -m pytest -n $(JOBS) -m "parity and not gpu and not slow" --count-skips -p no:cacheprovider

parity-current: $(DEV) ## the parity suite: TransformerLens 3.9, torch 2.13, transformers 5
	OMP_NUM_THREADS=1 $(BIN)/python $(PARITY) $(PARITY_FILES)

parity-tl4: ## ... TransformerLens 4.3, torch 2.13, transformers 5.24: TransformerBridge
parity-tl40: ## ... TransformerLens 4.0, the oldest without HookedTransformer
parity-tl2: ## ... TransformerLens 2.18, transformers 4.57
parity-tl216: ## ... TransformerLens 2.16.1, the oldest that SAELens admits
parity-old: ## ... TransformerLens 2.8.1, torch 2.0.1, transformers 4.40, Python 3.10 (5 GB)
parity-sae: ## SAELens' HookedSAETransformer and SAETransformerBridge as base classes
$(ENVIRONMENTS:%=parity-%): parity-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PARITY) $(if $(filter sae,$*),tests/whole/test_sae_lens.py tests/whole/test_sae_bridge.py,$(PARITY_FILES))

# Memory and time there, stock's and ours, for instance `make bench-old ARGS="--models gpt2-medium"`.
$(ENVIRONMENTS:%=bench-%): bench-%: .venv-%/.installed
	.venv-$*/bin/python -m benchmarks --only $(if $(filter tl4%,$*),bridge,load) $(ARGS)

lint: $(DEV) ## ruff's rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## mypy --strict
	$(BIN)/mypy

fuzz: $(DEV) ## load checkpoints that are broken at random: make fuzz ARGS="--cases 600 --seed 2"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.fuzzing $(ARGS)

bench: $(DEV) ## measure memory, load time and forward time; writes benchmarks/results/
	$(BIN)/python -m benchmarks

gpu-report: $(DEV) ## six minutes on a CUDA device: parity, loads, peaks; ARGS=--dry-run tries it out
	$(BIN)/python -m benchmarks.gpu_report $(ARGS)

gpu-wheels: $(DEV) ## what a machine with torch and transformers lacks for it, into gpu-wheels/
	PYTHON=$(BIN)/python tools/gpu_wheels

notebooks: $(DEV) ## run the notebooks and write their outputs
	$(BIN)/python -m notebooks.execute

notebooks-check: $(DEV) ## run them and leave the files as they are
	$(BIN)/python -m notebooks.execute --check

# Links and anchors that lead nowhere are errors.
docs: .venv-docs/.installed ## build the site of the documentation into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

docs-look: docs ## look at the site in chromium, at two widths; pictures go to site-pictures/
	.venv-docs/bin/python tools/look_at_site.py

# Each Python gets what pip chooses within the bounds of pyproject.toml; only torch is pinned.
RELEASE_PYTHONS ?= 3.10 3.11 3.12 3.13
release-check: .venv-release/.installed ## build wheel and sdist into dist/, check them, and try the wheel on every Python
	rm -rf dist && .venv-release/bin/python -m build --no-isolation
	.venv-release/bin/twine check --strict dist/*
	.venv-release/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	.venv-release/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	for version in $(RELEASE_PYTHONS); do tools/try_wheel $$version dist/*.whl || exit 1; done

embedded-model: $(BASE) ## train the embedded model anew (minutes)
	$(BIN)/python -m demo.train_embedded_model

.venv-release/.installed: pyproject.toml
	python=$$(tools/find_python 3.11) && $$python -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet build check-jsonschema hatchling twine
	touch $@

.venv-docs/.installed: constraints/docs.txt
	python=$$(tools/find_python 3.11) && $$python -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint $< \
		mkdocs-jupyter mkdocs-material "mkdocstrings[python]" ruff
	touch $@

# Made once, and again only when what it pins changes. torch goes first: see above.
.venv-%/.installed: constraints/%.txt pyproject.toml
	@echo "Installing into $(@D): some minutes the first time"
	python=$$(tools/find_python $(if $(filter old,$*),3.10,3.11)) && $$python -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $< --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint $< torch
	$(@D)/bin/python -m pip install --quiet --constraint $< --editable . \
		pytest pytest-xdist hypothesis einops $(if $(filter sae,$*),sae-lens) $(if $(filter old,$*),typeguard)
	touch $@

clean: ## remove .venv and every cache
	rm -rf $(VENV) $(ENVIRONMENTS:%=.venv-%) .venv-docs .venv-release site site-pictures .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
		|| { echo "tl_fastload needs Python 3.10 to 3.13: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned: left to the resolver, another package may draw a newer torch
# together with gigabytes of CUDA libraries.
$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): some minutes the first time"
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEV): $(BASE)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
