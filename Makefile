# `make demo` and `make test` set everything up themselves: a virtual environment in .venv with the package in it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Nothing here needs the network once the environment is there.
export HF_HUB_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
# torchao, which the tests use, makes newer torch say at every import that it does something in an old way.
export TORCH_LOGS = -torch.utils._pytree

# The lowest versions that setup.cfg declares, for `make test-lowest`.
LOWEST = $(shell sed -nE 's/^ +(torch|torchvision|transformers|huggingface_hub) >=([0-9.]+).*/\1==\2/p' setup.cfg)
LOWEST_BIN = .venv-lowest/bin

.PHONY: help install demo test test-all test-lowest test-gpu benchmark docs style check cards notebook clean

help:
	@echo "make demo         train a small Refiner on scikit-learn's digits into outputs/demo"
	@echo "make test         the fast tests"
	@echo "make test-all     all tests, the slow ones too"
	@echo "make test-lowest  the fast tests with the lowest declared versions, in a .venv-lowest of their own"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make benchmark    speed and memory against eager, plain attention and ViT, into docs/benchmarks/"
	@echo "make docs         render docs/ into site/"
	@echo "make style        format the code        make check   check style without changing anything"
	@echo "make cards        write model_cards/ anew      make notebook   docs/quick_start.ipynb, of the page"

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	rm -rf outputs/demo
	$(BIN)/python scripts/train.py

test: install
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: install
	$(BIN)/python -m pytest -n 2 -m "not gpu"

.venv-lowest/installed: setup.cfg pyproject.toml
	test -x $(LOWEST_BIN)/python || $(PYTHON) -m venv .venv-lowest
	$(LOWEST_BIN)/python -m pip install --quiet --upgrade pip
	$(LOWEST_BIN)/python -m pip install --quiet --editable '.[dev]' $(LOWEST)
	touch $@

test-lowest: .venv-lowest/installed
	$(LOWEST_BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# Hours on a CPU; it goes on where it was cut off. The tables in docs/benchmarks/ say what each was made with.
benchmark: install
	$(BIN)/python -m refiner_hf benchmark --roofline --output_dir docs/benchmarks

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-gpu: install
	$(BIN)/python -m pytest -m gpu

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

cards: install
	$(BIN)/python scripts/write_cards.py

notebook: install
	$(BIN)/python scripts/make_notebook.py

clean:
	rm -rf outputs site build dist *.egg-info .pytest_cache .ruff_cache
