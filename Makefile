# `make demo` and `make test` are the two targets to start with.
#
#   make demo       runs the complete pipeline on 5,000 real digits; pictures and a table go to demo/
#   make modes      trains the other two priors on the digits of the demo, and prints a table of all three
#   make test       runs all tests
#   make test-fast  runs the tests that are quick and start no processes, for use after each change
#   make lint       checks formatting, lint, types, and that the reference in docs/ is up to date
#   make docs       writes docs/cli.md and docs/settings.md from the commands and the settings
#   make format     applies the formatting
#   make install    creates .venv with movq and the development tools
#   make campaign   interrupts each command at its operations on files, damages each file, and kills ranks, for about an
#                   hour; the result goes to OUT/campaign.json
#   make bench      installs the peers, runs every benchmark on the CPU and prints a table; the results go to OUT
#   make gpu-check  runs the CUDA tests and every benchmark on CUDA and prints a table, from the source tree and with the
#                   Python named by GPU_PYTHON; it installs nothing: for the peers see "benchmarks" below
#   make clean-demo removes what the demo made

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MOVQ := $(BIN)/movq
INSTALLED := $(VENV)/installed
PEERS := $(VENV)/peers

.DELETE_ON_ERROR:
.PHONY: demo modes test test-fast campaign lint docs format install bench gpu-check clean-demo

# --- the environment ------------------------------------------------------------------------------------------------

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: movq needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# --- checks ---------------------------------------------------------------------------------------------------------

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not processes and not slow'

campaign: OUT ?= benchmarks/results
campaign: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaign --per-command 12 --out $(OUT)/campaign.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- benchmarks -----------------------------------------------------------------------------------------------------
# A peer that is not installed is skipped, and the output names it. For a machine without internet access, download the
# wheels of the peers, and of those requirements of movq that the machine lacks, on another machine, and unpack them into
# a folder that SITE names:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
#       pydantic pydantic-core annotated-types typing-inspection xxhash lpips torch-fidelity \
#       vector-quantize-pytorch einops einx loguru frozendict torch-einops-utils \
#       diffusers huggingface_hub importlib_metadata taming-transformers-rom1504
#   pip install --no-index --no-deps --target site wheels/*.whl      # on that machine
#   make gpu-check SITE=site
#
# TAMING=CLONE takes taming-transformers from a clone. ONLY="sampling growth" runs only these benchmarks. TESTS= leaves out
# the tests. What does not finish within MINUTES is named at the end.

bench gpu-check: OUT ?= benchmarks/results
gpu-check: MINUTES ?= 8.7
gpu-check: TESTS ?= tests/test_cuda.py

bench: $(PEERS)
	PYTHONPATH=. $(BIN)/python -m benchmarks --device cpu --out $(OUT) $(if $(TAMING),--taming $(TAMING)) $(ONLY)

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps taming-transformers-rom1504
	touch $@

gpu-check: export PYTHONPATH := $(CURDIR)$(if $(SITE),:$(abspath $(SITE)))
gpu-check:
	$(GPU_PYTHON) -m benchmarks --device cuda --minutes $(MINUTES) --out $(OUT) \
		$(if $(TESTS),--tests $(TESTS)) $(if $(TAMING),--taming $(TAMING)) $(ONLY)

# --- the demo -------------------------------------------------------------------------------------------------------
# Each target is the JSON result of one command, which is renamed to its final name when the command has succeeded. A second
# `make demo` therefore does nothing, and an interrupted one resumes (the commands themselves resume, too).

demo: demo/report.json
	@$(BIN)/python -m benchmarks.digits --show demo

demo/prepare.json: | $(INSTALLED)
	@mkdir -p demo
	$(MOVQ) prepare digits data/digits --json > $@.partial && mv $@.partial $@

demo/train-vq.json: demo/prepare.json
	$(MOVQ) train-vq --preset digits --json > $@.partial && mv $@.partial $@

demo/train-prior.json: demo/train-vq.json
	$(MOVQ) train-prior --preset digits --tokenizer runs/digits-vq --json > $@.partial && mv $@.partial $@

demo/reconstruct.json: demo/train-vq.json
	$(MOVQ) reconstruct data/digits demo/reconstructions --split val --run runs/digits-vq \
		--grid demo/reconstructions.png --json > $@.partial && mv $@.partial $@

demo/sample.json: demo/train-prior.json
	$(MOVQ) sample --steps 8 --n 1000 --run runs/digits-prior --grid demo/samples.png --json demo/samples \
		> $@.partial && mv $@.partial $@

demo/evaluate.json: demo/reconstruct.json
	$(MOVQ) evaluate --psnr --ssim data/digits demo/reconstructions --json > $@.partial && mv $@.partial $@

demo/report.json: demo/evaluate.json demo/sample.json
	$(BIN)/python -m benchmarks.digits demo

# Train the other two priors on the same digits, and measure how often each prior draws the requested digit.
modes: demo/auto.json demo/depth.json demo/report.json
	$(BIN)/python -m benchmarks.modes

demo/auto.json demo/depth.json: demo/%.json: demo/train-vq.json
	$(MOVQ) train-prior --preset digits --mode $* --tokenizer runs/digits-vq --json > $@.partial && mv $@.partial $@

clean-demo:
	rm -rf demo data/digits runs/digits-vq runs/digits-prior runs/digits-auto runs/digits-depth

# --- the paper's pipelines ------------------------------------------------------------------------------------------
# make ffhq FFHQ=/path/to/ffhq; make imagenet IMAGENET=/path/to/imagenet (with train/ and val/ class folders)

.PHONY: ffhq imagenet

ffhq: out/ffhq.json
imagenet: out/imagenet.json

data/ffhq/manifest.json: | $(INSTALLED)
	@test -n "$(FFHQ)" || { echo "error: name the folder of FFHQ's images: make ffhq FFHQ=/path" >&2; exit 2; }
	$(MOVQ) prepare $(FFHQ) data/ffhq --size 256 --square --val 10000 --no-labels

data/imagenet/manifest.json: | $(INSTALLED)
	@test -n "$(IMAGENET)" || { echo "error: name ImageNet's folder: make imagenet IMAGENET=/path" >&2; exit 2; }
	$(MOVQ) prepare $(IMAGENET) data/imagenet --size 256 --upscale

out/%-vq.json: data/%/manifest.json
	@mkdir -p out
	$(MOVQ) train-vq --preset $* --json > $@.partial && mv $@.partial $@

out/%-prior.json: out/%-vq.json
	$(MOVQ) train-prior --preset $* --tokenizer runs/$*-vq --json > $@.partial && mv $@.partial $@

out/ffhq-samples.json: N := 60000
out/imagenet-samples.json: N := 50000
out/%-samples.json: out/%-prior.json
	$(MOVQ) sample --n $(N) --run runs/$*-prior --json out/$*-samples > $@.partial && mv $@.partial $@

out/%.json: out/%-samples.json
	$(MOVQ) evaluate --fid --is --prc --crop 256 --preset $* --split train data/$* out/$*-samples --json \
		> $@.partial && mv $@.partial $@

.PRECIOUS: data/%/manifest.json out/%-vq.json out/%-prior.json out/%-samples.json
