# Two commands: `make demo` and `make test`. Everything else is made from these pieces.
#
#   make demo       the whole pipeline on 5,000 real digits: pictures and a table in demo/
#   make modes      after it: the demo's other two priors, and a table of all three
#   make test       the tests
#   make test-fast  the tests that take neither long nor processes of their own: for after each change
#   make lint       formatting, lint, types, and whether the reference in docs/ is up to date
#   make docs       the reference in docs/, generated from the commands and the settings
#   make install    .venv with movq and what development needs
#   make bench      every benchmark on the CPU beside its peers, which it installs, and a table; results to OUT
#   make gpu-check  the CUDA tests, every benchmark on CUDA and the table, from the source tree, with the Python that is
#                   there (GPU_PYTHON); installs nothing: see below for the peers
#   make clean-demo remove what the demo made

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MOVQ := $(BIN)/movq
INSTALLED := $(VENV)/installed
PEERS := $(VENV)/peers

.DELETE_ON_ERROR:
.PHONY: demo modes test test-fast lint docs format install bench gpu-check clean-demo

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
# A peer that is not there is skipped by name. A machine without internet gets wheels that were fetched elsewhere, of the
# peers and of what movq itself needs and is missing there, unpacked into a folder that SITE names:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
#       pydantic pydantic-core annotated-types typing-inspection lpips torch-fidelity \
#       vector-quantize-pytorch einops einx loguru frozendict torch-einops-utils \
#       diffusers huggingface_hub importlib_metadata taming-transformers-rom1504
#   pip install --no-index --no-deps --target site wheels/*.whl      # there
#   make gpu-check SITE=site
#
# TAMING=CLONE takes taming-transformers from a clone; ONLY="sampling growth" runs some, TESTS= without the tests. What
# MINUTES do not last for is named at the end.

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
# Each target is the JSON result of one command, moved into place when the command has ended well: a second `make demo`
# does nothing, and an interrupted one goes on where it was (the commands resume by themselves).

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

# The other two priors on the same digits, and how often each draws the requested digit.
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
