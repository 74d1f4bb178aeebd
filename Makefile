# Two commands: `make tutorial` trains and draws, `make test` tests on all three backends.

PYTHON ?= python3
VENV ?= .venv
# The Keras backend of the tutorial: jax, tensorflow or torch.
BACKEND ?= jax

BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: tutorial test lint fuzz bench figures clean
.PHONY: test-tensorflow test-jax test-torch

tutorial: $(VENV)/.tutorial-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(BIN)/normwise tutorial

test: test-tensorflow test-jax test-torch lint

test-tensorflow test-jax test-torch: test-%: $(VENV)/.dev
	KERAS_BACKEND=$* $(BIN)/python -m pytest --quiet

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The property tests with 2,000 examples each, other ones on every run.
fuzz: $(VENV)/.dev
	HYPOTHESIS_PROFILE=fuzz KERAS_BACKEND=$(BACKEND) $(BIN)/python -m pytest --quiet \
		tests/test_contract.py tests/test_tutorial_data.py

# Our layers' speed beside Keras's, on each backend.
bench: $(VENV)/.dev
	for backend in tensorflow jax torch; do \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/against_keras.py || exit 1; \
	done

# The pictures of README.md and docs/.
figures: $(VENV)/.dev
	KERAS_BACKEND=jax $(BIN)/normwise tutorial --out docs/pictures
	$(BIN)/python benchmarks/accuracy.py docs/pictures/accuracy.png

$(VENV):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tutorial-$(BACKEND): pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) '.[tutorial,$(BACKEND)]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis normwise-tutorial
