# make run       builds deskside in .venv and talks to the bundled model
# make test      builds, then lint, types and the tests that need no other engine
# make test-all  the same, then the tests with torch, Triton, transformers, llama.cpp, ik_llama.cpp
#                (about 1.2 GB to install) and a browser, if there is one
# make wheel      makes the sdist and a manylinux wheel, in dist/
# make wheel-check  the same, then installs the wheel without a compiler and tries it
# make gpu-check  everything that only a GPU can show, in at most eight minutes: right, then fast.
#            Without one it runs what it can on an emulated device. PARTS="models decode": these.
# make bench-peers  compares with llama.cpp and ik_llama.cpp on this machine. QUICK=1: a small slice,
#            under five minutes. FILES="a.gguf b.gguf": these instead of synthetic slices. THREADS=n.
#            NATIVE=1: builds the peers for this CPU (LLAMA_LIB=, IK_LIB=: takes these libllama.so).
#            RESUME=1: goes on with the newest record in reports/. ARGS=: see --help
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
SOURCES := pyproject.toml CMakeLists.txt $(shell find native src -type f -not -name '*.pyc' -not -name '*.so')
# Two files of tests at a time: many wait for a process that they started.
PYTEST := $(PY) -m pytest -q -n 2 --dist loadfile
# The native code as clang-tidy reads it: one instruction set is enough, its sources are the same.
CXX_FILES := $(wildcard native/*.[ch]* native/*/*.[ch]* tests/native/*.cpp)
CXX_FLAGS = -std=c++20 -DDESKSIDE_ISA=scalar -Inative -Inative/isa -Inative/program -Inative/weights \
  $(shell $(PY) -c "import nanobind, sysconfig; \
    print('-isystem', nanobind.include_dir(), '-isystem', sysconfig.get_path('include'))")
QUESTION := Hello, who are you?
# Where there is a ccache, it compiles: `make test` and `make wheel` have most files and flags in common.
ifneq ($(shell command -v ccache),)
  export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
  export CCACHE_BASEDIR ?= $(CURDIR)
endif

# The packages of an extra in pyproject.toml, without building deskside again.
define install_extra
@$(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'], sep='\n')" > $(VENV)/$(1).txt
$(PIP) install -r $(VENV)/$(1).txt
endef

.PHONY: run test test-all check format wheel wheel-check bench-peers gpu-check clean
# The targets share one environment.
.NOTPARALLEL:

# Without a terminal there is nobody to talk to: ask one question.
run: $(VENV)/built
	@if [ -t 0 ]; then set --; else set -- -n 200 -p "$(QUESTION)"; fi; \
	  $(VENV)/bin/deskside run --temp 0.3 "$$@"

test: $(VENV)/tools check
	$(PYTEST) -m "not external" --ignore=tests/oracles

test-all: test $(VENV)/oracles
	DESKSIDE_REQUIRE_ORACLES=1 $(PYTEST) -m external --ignore=tests/oracles
	DESKSIDE_REQUIRE_ORACLES=1 $(PY) -m pytest -q tests/oracles

check: $(VENV)/tools
	$(VENV)/bin/ruff check src tests tools
	$(VENV)/bin/ruff format --check -q src tests tools
	$(VENV)/bin/mypy
	@echo "clang-format and clang-tidy (half a minute)"
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	@printf '%s\n' $(filter native/%.cpp,$(CXX_FILES)) | xargs -P 4 -I{} \
	  $(VENV)/bin/clang-tidy --quiet {} -- $(CXX_FLAGS)

format: $(VENV)/tools
	$(VENV)/bin/ruff format src tests tools
	$(VENV)/bin/ruff check --fix src tests tools
	$(VENV)/bin/clang-format -i $(CXX_FILES)

wheel: $(VENV)/release
	$(PY) tools/wheel.py

wheel-check: $(VENV)/release
	$(PY) tools/wheel.py --check

# Where scikit-build-core, nanobind, cmake and ninja are installed it builds offline, into a folder of
# its own; elsewhere it takes the environment of `make run`. PYTHON=: another interpreter; PARTS=.
gpu-check:
	@python=$(PYTHON); \
	  if [ -z "$$python" ]; then python=python3; \
	    $$python -c "import torch, nanobind, scikit_build_core, cmake" 2>/dev/null || \
	      { $(MAKE) -s $(VENV)/oracles && python=$(PY); }; fi; \
	  $$python tools/gpu_check.py $(PARTS)

on = $(if $(filter-out 0,$(1)),$(2))
bench-peers: $(VENV)/built
	@$(PY) -m tools.compare.peers $(FILES) $(call on,$(QUICK),--quick) $(call on,$(NATIVE),--native) \
	  $(if $(THREADS),--threads $(THREADS)) $(if $(LLAMA_LIB),--llama-lib $(LLAMA_LIB)) \
	  $(if $(IK_LIB),--ik-lib $(IK_LIB)) $(call on,$(RESUME),--resume) $(ARGS)

$(PY):
	tools/bootstrap.sh $(VENV)

$(VENV)/built: $(PY) $(SOURCES)
	@echo "building deskside (about a minute)"
	$(PIP) install .
	@touch $@

# The build that the tests use has one more instruction set, never chosen unasked; `run` and the
# benchmarks may use it too. So sources that changed are compiled once, and a build without it never
# leaves this target up to date.
$(VENV)/tools: $(PY) $(SOURCES)
	@emulate=$$(tools/bootstrap.sh --simde) && \
	  echo "building deskside for tests (about two minutes)" && \
	  $(PIP) install . -C cmake.define.DESKSIDE_EMULATE_AVX512=$$emulate \
	    -C cmake.define.DESKSIDE_WERROR=ON
	$(call install_extra,test)
	@touch $(VENV)/built $@

$(VENV)/oracles: $(VENV)/tools
	@echo "installing the engines that deskside is compared with"
	$(call install_extra,oracles)
	$(PY) -m tests.oracles.fetch
	@touch $@

$(VENV)/release: $(PY) pyproject.toml
	$(call install_extra,release)
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers build dist
