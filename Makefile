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
#       pydantic pydantic-core annotated-types typing-inspection typing_extensions xxhash lpips torch-fidelity \
#       vector-quantize-pytorch einops einx loguru frozendict torch-einops-utils \
#       diffusers 'huggingface_hub<2' 'importlib_metadata<9' taming-transformers-rom1504
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

# --- the paper's tables and figures ----------------------------------------------------------------------------------
# make tables FFHQ=/path/to/ffhq IMAGENET=/path/to/imagenet     all of them (IMAGENET has train/ and val/ class folders)
# make table1|table2|table3|fig6a|fig6b|fig6c|figA1             one of them
# make ffhq, make imagenet                                      the rows of the preset of that name alone
# make plan                                                     what each training costs, before it is started
# make tables-small SMALL=/path/to/images                       the same rules with tiny networks at 32 pixels, in minutes
#
# GPUS=8 uses eight GPUs, and WEIGHTS=FOLDER the pretrained networks in a folder. Each file in $(RESULTS) is the result of
# one command, which resumes when it is run again. A table shows the published values beside the measured ones:
# $(RESULTS)/table1.md, and the same as JSON.
#
# FFHQ_VAL_LIST=FILE holds out the 10,000 images of VQGAN's list. Without it, 10,000 others are drawn. The list is in the
# repository of taming-transformers:
#
#   curl -O https://raw.githubusercontent.com/CompVis/taming-transformers/master/data/ffhqvalidation.txt
#   make tables FFHQ=/path/to/ffhq/images1024x1024 FFHQ_VAL_LIST=ffhqvalidation.txt
#
# FILTER is the resize filter of the images, by default that of VQGAN's code.

DATA ?= data
RUNS ?= runs
RESULTS ?= out
GPUS ?=
WEIGHTS ?=

# What differs at a small size.
SIDE ?= 256
FILTER ?= vqgan
FFHQ_VAL ?= 10000
FFHQ_VAL_LIST ?=
FFHQ_SAMPLES ?= 60000
IMAGENET_SAMPLES ?= 50000
IMAGENET_VAL ?=
VQ_OPTIONS ?=
PRIOR_OPTIONS ?=
IMAGENET_PRIOR_OPTIONS ?=
RECONSTRUCTION_METRICS ?= --psnr --ssim --lpips --fid
SAMPLE_METRICS ?= --fid --is --prc
SAMPLE_SPLIT ?= train

TABLES := table1 table2 table3 fig6a fig6b fig6c

# The rows: presets, of which reconstructions are compared, and presets with the mode of a prior, of which samples are.
table1 := $(addsuffix -reconstructions,vqgan-ffhq ffhq vqgan-imagenet vqgan-imagenet-16384 imagenet)
table2 := $(addsuffix -samples,ffhq-auto ffhq-mask)
table3 := $(addsuffix -samples,imagenet-auto imagenet-mask)
rows6a := vqgan-ffhq multichannel-ffhq sinusoid-ffhq constant-ffhq ffhq
fig6a := $(foreach row,$(rows6a),$(row)-reconstructions $(row)-mask-samples)
fig6b := $(addsuffix -reconstructions,vqgan-imagenet vqgan-imagenet-16384 imagenet imagenet-16384)
rows6c := ffhq-1ch ffhq-2ch ffhq ffhq-8ch
fig6c := $(foreach row,$(rows6c),$(row)-reconstructions $(row)-mask-samples)

# The data set of a row, by the name of its preset.
set = $(if $(findstring imagenet,$(1)),imagenet,ffhq)
gpus := $(if $(GPUS),--gpus $(GPUS))
weights := $(if $(WEIGHTS),--weights $(WEIGHTS))
samples = $(if $(findstring imagenet,$(1)),$(IMAGENET_SAMPLES),$(FFHQ_SAMPLES))

.PHONY: tables $(TABLES) figA1 ffhq imagenet plan tables-small
.SECONDARY:
.SECONDEXPANSION:

tables: $(TABLES) figA1

$(TABLES): %: $(RESULTS)/%.md
	@cat $<

figA1: $(RESULTS)/figA1.png
	@echo $<

ffhq: $(addprefix $(RESULTS)/metrics/ffhq-,reconstructions.json mask-samples.json)
imagenet: $(addprefix $(RESULTS)/metrics/imagenet-,reconstructions.json mask-samples.json)

$(DATA)/ffhq/manifest.json: | $(INSTALLED)
	@test -n "$(FFHQ)" || { echo "error: name the folder of FFHQ's images: make $(MAKECMDGOALS) FFHQ=/path" >&2; exit 2; }
	$(MOVQ) prepare $(FFHQ) $(DATA)/ffhq --size $(SIDE) --square --upscale --filter $(FILTER) --no-labels \
		$(if $(FFHQ_VAL_LIST),--val-list $(FFHQ_VAL_LIST),--val $(FFHQ_VAL))

$(DATA)/imagenet/manifest.json: | $(INSTALLED)
	@test -n "$(IMAGENET)" || { echo "error: name ImageNet's folder: make $(MAKECMDGOALS) IMAGENET=/path" >&2; exit 2; }
	$(MOVQ) prepare $(IMAGENET) $(DATA)/imagenet --size $(SIDE) --upscale --filter $(FILTER) \
		$(if $(IMAGENET_VAL),--val $(IMAGENET_VAL))

$(RESULTS)/%-vq.json: $(DATA)/$$(call set,$$*)/manifest.json
	@mkdir -p $(RESULTS)
	$(MOVQ) train-vq --preset $* --data $(DATA)/$(call set,$*) --run $(RUNS)/$*-vq $(gpus) $(weights) $(VQ_OPTIONS) --json \
		> $@.partial && mv $@.partial $@

# The original images are cropped as in VQGAN's validation: to the central square.
$(RESULTS)/%-reconstructions.json: $(RESULTS)/%-vq.json
	$(MOVQ) reconstruct $(DATA)/$(call set,$*) $(RESULTS)/$*-reconstructions --split val --crop $(SIDE) \
		--run $(RUNS)/$*-vq --json > $@.partial && mv $@.partial $@

$(RESULTS)/metrics/%-reconstructions.json: $(RESULTS)/%-reconstructions.json
	$(MOVQ) evaluate $(RECONSTRUCTION_METRICS) --crop $(SIDE) --preset $* --split val $(gpus) $(weights) \
		$(DATA)/$(call set,$*) $(RESULTS)/$*-reconstructions --out $@

# The prior of one mode, its samples and their metrics.
define prior_of_mode
$(RESULTS)/%-$(1)-prior.json: $(RESULTS)/%-vq.json
	$(MOVQ) train-prior --preset $$* --mode $(1) --data $(DATA)/$$(call set,$$*) --tokenizer $(RUNS)/$$*-vq \
		--run $(RUNS)/$$*-$(1) $(gpus) $(weights) $(PRIOR_OPTIONS) $$(if $$(findstring imagenet,$$*),$(IMAGENET_PRIOR_OPTIONS)) --json > $$@.partial && mv $$@.partial $$@

$(RESULTS)/%-$(1)-samples.json: $(RESULTS)/%-$(1)-prior.json
	$(MOVQ) sample --n $$(call samples,$$*) --run $(RUNS)/$$*-$(1) $(gpus) --json $(RESULTS)/$$*-$(1)-samples \
		> $$@.partial && mv $$@.partial $$@

$(RESULTS)/metrics/%-$(1)-samples.json: $(RESULTS)/%-$(1)-samples.json
	$(MOVQ) evaluate $(SAMPLE_METRICS) --crop $(SIDE) --preset $$* --split $(SAMPLE_SPLIT) $(gpus) $(weights) \
		$(DATA)/$$(call set,$$*) $(RESULTS)/$$*-$(1)-samples --out $$@
endef
$(foreach mode,mask auto,$(eval $(call prior_of_mode,$(mode))))

$(RESULTS)/%.md: $$(foreach row,$$($$*),$(RESULTS)/metrics/$$(row).json)
	$(MOVQ) evaluate --table $^ --out $(RESULTS)/$*.json --quiet > $@.partial && mv $@.partial $@

$(RESULTS)/figA1.png: $(RESULTS)/ffhq-mask-prior.json
	$(MOVQ) reconstruct $(DATA)/ffhq $(RESULTS)/figA1 --split val --mask-ratio 0.95 --samples 3 --prior $(RUNS)/ffhq-mask \
		--figure $@.partial.png && mv $@.partial.png $@

plan: $(INSTALLED)
	$(BIN)/python -m benchmarks.plan

# Tiny networks: the same presets with other sizes. The samples are compared with the few images of the val split: the
# features of a large train split would take longer than all else.
STEPS ?= 60
SMALL_VAL ?= 100
SMALL_SAMPLES ?= 64
small := vq.resolution=32 vq.channels=32 vq.multipliers=[1,1,2] vq.blocks=1 vq.attention_resolutions=[8] \
	vq.z_channels=64 vq.embed_dim=32
small_vq := train_vq.batch_size=16 train_vq.epochs=null train_vq.steps=$(STEPS) train_vq.perceptual_weight=0 \
	train_vq.adversarial_weight=0 train_vq.validate_every=$(STEPS) train_vq.evaluate_every=0
small_prior := prior.layers=2 prior.width=64 prior.heads=2 prior.hidden=128 views.scales=[] train_prior.batch_size=16 \
	train_prior.epochs=null train_prior.steps=$(STEPS) train_prior.validate_every=$(STEPS) train_prior.evaluate_every=0
# `make table2-small` and so on make one of them.
tables-small: made := tables
$(addsuffix -small,$(TABLES) figA1): made = $(@:-small=)
.PHONY: $(addsuffix -small,$(TABLES) figA1)
tables-small $(addsuffix -small,$(TABLES) figA1):
	@test -n "$(SMALL)" || { echo "error: name a folder of images with class folders: make $@ SMALL=/path" >&2; exit 2; }
	$(MAKE) $(made) DATA=$(RESULTS)/small/data RUNS=$(RESULTS)/small/runs RESULTS=$(RESULTS)/small \
		FFHQ="$(SMALL)" IMAGENET="$(SMALL)" SIDE=32 FFHQ_VAL=$(SMALL_VAL) IMAGENET_VAL=$(SMALL_VAL) \
		FFHQ_SAMPLES=$(SMALL_SAMPLES) IMAGENET_SAMPLES=$(SMALL_SAMPLES) \
		VQ_OPTIONS="$(addprefix -o ,$(small) $(small_vq))" PRIOR_OPTIONS="$(addprefix -o ,$(small) $(small_prior))" \
		IMAGENET_PRIOR_OPTIONS="-o prior.classes=$(words $(wildcard $(SMALL)/*/))" \
		RECONSTRUCTION_METRICS="--psnr --ssim --fid" SAMPLE_METRICS=--fid SAMPLE_SPLIT=val
