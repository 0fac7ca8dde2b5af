# One target per habit. A fresh machine needs Python >= 3.11 and make; `make install` prepares the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: install demo test test-all test-gpu test-asan test-timm lint format typecheck check bench bench-full readme-table build build-cuda wheel docs clean
.DEFAULT_GOAL := check

install: $(STAMP)

# Editable install of vitzoo with its extension where a compiler is found, everything pinned by constraints.txt.
$(STAMP): constraints.txt pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vitzoo needs Python >= 3.11; name one with: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "no venv module: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel torch torchvision
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/vitzoo demo --out results --int8

test: install
	$(PYTEST) -n 2 -m "not slow and not gpu"

test-all: install
	$(PYTEST) -n 2 -m "not gpu"

test-gpu: install
	$(PYTEST) -m gpu

# AddressSanitizer and UBSan over the C++ kernels and the host form of the CUDA kernels: vitzoo._C is built anew in
# build/asan, in a copy of the tree. Leaks are Python's own business.
ASAN := build/asan
test-asan: install
	mkdir -p $(ASAN) && git ls-files -co --exclude-standard -z | tar c --null -T - | tar x -C $(ASAN)
	cd $(ASAN) && VITZOO_SANITIZE=address,undefined $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd $(ASAN) && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=$(CURDIR)/$(ASAN) \
		$(CURDIR)/$(PYTEST) -n 2 tests/kernels -m "not slow and not gpu" -k "$(or $(K),cpu or cuda or exec or threads)"

test-timm: install
	$(BIN)/python tests/timm_suite.py $(if $(ALL),--all)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs -r $(BIN)/clang-format -i

typecheck: install
	$(BIN)/mypy

check: lint typecheck test

docs: install
	$(BIN)/python docs/generate.py

# A run that fails leaves no file: the JSON gets its name when it is whole.
define microbenchmark
	@mkdir -p results
	$(PYTEST) benchmarks -q --benchmark-columns=median,iqr,rounds --benchmark-json=$(1).part $(2)
	mv $(1).part $(1)
endef

bench: install
	$(call microbenchmark,results/bench.json,--benchmark-min-rounds=3 --benchmark-max-time=0.3)

bench-full: install
	$(call microbenchmark,results/bench-full.json,--full --benchmark-min-rounds=3)

# RESULT: another result file of the headline suite than the one that README.md names
readme-table: install
	$(BIN)/python benchmarks/readme_table.py $(RESULT)

build: install
	$(BIN)/python setup.py -q build_ext --inplace

# Shows that the CUDA kernels, which install builds where nvcc is, load without a GPU and do not spill.
build-cuda: install
	$(BIN)/python -c 'import sys; from vitzoo.kernels.common import native; sys.exit(native.cuda_extension_why_not())'
	$(BIN)/python benchmarks/cuda_resources.py

wheel: install
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf build dist results *.egg-info vitzoo/*.so .mypy_cache .ruff_cache .pytest_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
