# The only entry points a newcomer needs: `make test`, `make bench`, `make help`.
#
#   PYTHON   the interpreter to build for                         (python3)
#   VENV     the virtual environment to prepare, or `none`        (.venv)
#   TORCH    what to install where PYTHON has no torch >= 2.11    (the tested release)
#   TESTS    which tests to run                                   (python_tests)
#
# VENV=none uses PYTHON exactly as it is and downloads nothing: the package goes into build/site.
# GROUPCONV_CUDA=AUTO|ON|OFF and GROUPCONV_SIMD=ON|OFF reach the native build (see setup.py).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TESTS ?= python_tests
PYTEST_ARGS ?=
export GROUPCONV_CUDA GROUPCONV_SIMD

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test bench lint wheel docs sanitize clean FORCE

# The tests must see the installed package and never the sources beside them, in every subprocess too.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := setup.py CMakeLists.txt pyproject.toml MANIFEST.in README.md LICENSE \
  $(shell find csrc groupconv_ext tools/refuse_spills.py -type f -not -name '*.so' -not -name '*.pyc')
NATIVE_SOURCES := $(shell find csrc python_tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

ifeq ($(VENV),none)
  PY := $(PYTHON)
  CLANG_FORMAT := clang-format
  READY := build/ready
  SITE := $(CURDIR)/build/site
  export PYTHONPATH := $(SITE)$(if $(PYTHONPATH),:$(PYTHONPATH))
  INSTALL := --target $(SITE) --upgrade
else
  PY := $(VENV)/bin/python
  CLANG_FORMAT := $(VENV)/bin/clang-format
  READY := $(VENV)/ready
  INSTALL := --force-reinstall
endif

# The `groupconv` command, wherever it was installed.
GROUPCONV := $(PY) -c 'import sys; from groupconv_ext.cli import main; sys.exit(main())'

help: ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

test: build/installed ## Build, install and test the package
	$(PY) -m pytest $(TESTS) $(PYTEST_ARGS)

bench: build/installed ## Build, install and run the quick benchmark; leaves a report in build/bench
	$(GROUPCONV) bench --quick --out build/bench

lint: $(READY) ## Check style, types, formatting and the rules of the house
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(NATIVE_SOURCES)
	$(PY) -m pytest -q python_tests/test_house_rules.py

wheel: build/wheel ## Build the wheel into dist/
	@ls dist/*.whl

docs: build/installed ## Write the API documentation to build/docs
ifneq ($(VENV),none)
	@$(call requirements,docs) | $(PY) -m pip install -q -r /dev/stdin
endif
	$(PY) -m pdoc -o build/docs groupconv_ext

# The op library is instrumented, python is not: the sanitizer's runtime has to be there first. Tests ask for memory
# that there is not, which is an error to report and no crash. A sanitizer sees nothing of what matrix registers read
# and write, and few processors have them: they are emulated.
sanitize: $(READY) ## Run the native tests under the address and undefined-behaviour sanitizers
	rm -rf build/lib* build/bdist*
	GROUPCONV_CUDA=OFF GROUPCONV_EMULATE_AMX=ON \
	  GROUPCONV_SANITIZE=address,undefined GROUPCONV_BUILD_DIR=build/sanitize/cmake \
	  $(PY) -m pip install -q --no-deps --no-index --no-build-isolation --upgrade --target build/sanitize/site .
	PYTHONPATH=$(CURDIR)/build/sanitize/site \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PY) -m pytest $(TESTS) -m native -p no:cacheprovider $(PYTEST_ARGS)

clean: ## Remove everything that was built; the virtual environment stays
	rm -rf build dist *.egg-info groupconv_ext/*.so
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

# ---- Steps, each stamped by a file: a second run does only what has changed -----------------------

# Files that change when these settings do, and only then.
remember = @mkdir -p build; echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@
build/which-python: FORCE
	$(call remember,$(PYTHON) $(VENV) $(TORCH))
build/which-build: FORCE
	$(call remember,$(CXX) $(GROUPCONV_CUDA) $(GROUPCONV_SIMD))

ifeq ($(VENV),none)

$(READY): build/which-python
	$(PY) tools/check_interpreter.py
	@touch $@

else

has_torch = $(1) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null

# The requirements of an extra, one a line: pyproject.toml is the only place that lists them.
requirements = $(PYTHON) -c 'import sys, tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
  e = t["project"]["optional-dependencies"] | {"build": t["build-system"]["requires"]}; \
  print(*(r for name in sys.argv[1:] for r in e[name] if not r.startswith("torch>")), sep="\n")' $(1)

# A torch that PYTHON has is kept, by letting the environment see PYTHON's packages. Otherwise TORCH is
# installed and no other: a torch that pip chose would be one that nobody has tested.
$(READY): build/which-python pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "groupconv-ext needs Python 3.11 or later, and $(PYTHON) is older: set PYTHON"; exit 1; }
	$(PYTHON) -m venv $$($(call has_torch,$(PYTHON)) && echo --system-site-packages) $(VENV)
	$(call has_torch,$(PY)) || $(PY) -m pip install '$(TORCH)' numpy
	@$(call requirements,build test plots dev) | $(PY) -m pip install -q -r /dev/stdin
	@touch $@

endif

# setuptools would put files that were deleted since the last time into the wheel again.
build/wheel: $(READY) build/which-build $(SOURCES)
	rm -rf build/lib* build/bdist* dist
	$(PY) -m pip wheel . --no-deps --no-index --no-build-isolation --wheel-dir dist
	@touch $@

build/installed: build/wheel
	$(PY) -m pip install --no-deps --no-index $(INSTALL) dist/*.whl
	@touch $@
