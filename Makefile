# icd_lightning: the commands people use. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ICD    := $(BIN)/icd
STAMP  := $(VENV)/.installed
MODEL  ?=
GUIDED ?=
DATA   ?=
VAL    ?=
ARGS   ?=
RESULTS ?=

.DEFAULT_GOAL := help
.PHONY: help browser install lock install-locked demo app test test-all test-faults mutants audit lint train-tiny distill-guidance-sd15 distill-guidance-sdxl distill-guidance-sd3 \
  train-sd15 train-sdxl train-sd3 train-flux train-tiny-flow eval-inversion eval-generation eval-guidance eval-editing ablations \
  notebooks notebook-results figures tensorboard tiny-weights tiny-flow-weights tiny-report gpu-figures docs clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-22s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv with everything in it (every other target does so first)

lock: $(STAMP) ## write hashes.txt: version and SHA-256 of every file that pip would install on this kind of machine
	@mkdir -p build
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report build/files.json --constraint constraints.txt '.[dev]' 'setuptools>=77'
	@$(BIN)/python -c 'import json; files = [item for item in json.load(open("build/files.json"))["install"] if not item["is_direct"]]; \
	  print(*("{0[metadata][name]}=={0[metadata][version]} --hash=sha256:{0[download_info][archive_info][hashes][sha256]}".format(f) for f in files), sep="\n")' > hashes.txt

install-locked: hashes.txt ## make .venv of the files in hashes.txt and of no others
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement hashes.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: $(STAMP) ## distil, invert, generate and edit with the tiny family; results in outputs/demo
	$(ICD) demo $(ARGS)

app: $(STAMP) ## edit pictures in the browser, with ARGS='--model ...' another model's
	$(ICD) app $(ARGS)

browser: # where there is none: Debian's, if it may be installed
	@for name in chromium chromium-browser google-chrome; do ! command -v $$name >/dev/null || exit 0; done; \
	{ test "$$(id -u)" = 0 && timeout 300 apt-get install --quiet --yes chromium >/dev/null 2>&1; } || \
	echo 'there is no Chromium or Chrome: the tests of web pages are skipped'

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
test: $(STAMP) browser ## the fast tests on all cores, as CI runs them; one that hangs is ended with its stacks
	$(PYTEST) --timeout 180 --timeout-method thread $(ARGS)

test-all: $(STAMP) browser ## all tests, the slow ones too
	$(PYTEST) -m '' $(ARGS)

mutants: $(STAMP) ## put faults into a copy of the package, one at a time, and see which of them no test sees
	$(BIN)/python tests/mutants/run.py $(ARGS)

test-faults: $(STAMP) ## kills, full disks, hostile files (slow); writes what was measured into docs/reliability.md
	ICD_RELIABILITY=docs/reliability.md $(BIN)/python -m pytest -m '' tests/faults $(ARGS)

audit: ## look up known vulnerabilities of the exact versions in constraints.txt; pip-audit gets a venv of its own
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet 'pip-audit>=2.9,<3'; }
	build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip $(ARGS)

lint: $(STAMP) ## ruff, and mypy on the mathematics
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

SHAPES := data/shapes/train/manifest.json data/shapes/val/manifest.json
data/shapes/train/manifest.json: | $(STAMP)
	$(ICD) data shapes --out data/shapes/train --count 20000 --seed 0

data/shapes/val/manifest.json: | $(STAMP)
	$(ICD) data shapes --out data/shapes/val --count 512 --seed 6

train-tiny: $(SHAPES) ## train both tiny students longer; results in outputs/train-tiny
	$(ICD) fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/experiment/tiny.yaml $(ARGS)

train-tiny-flow: $(SHAPES) ## the same for tiny_flow, a flow-matching transformer; results in outputs/train-tiny-flow
	$(ICD) fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/model/tiny_flow.yaml \
	  --config conf/experiment/tiny_flow.yaml $(ARGS)

NEEDS_DATA = @test -n "$(DATA)" || { printf '%s\n' \
  'make $@ needs weights and data that do not come with this repository:' \
  '  MODEL=$(or $(MODEL),?)    the model: a folder in diffusers layout, one file, or a hub id (default: that of conf/model)' \
  '  GUIDED=$(or $(GUIDED),?)   stage 2 only: the UNet of stage 1, its folder or a released .pt file (default: outputs/guidance-...)' \
  '  DATA=?     shards of pictures and captions, as in /data/laion/{00000..01999}.tar (data/README.md)' \
  '  VAL=$(or $(VAL),?)      local shards of other pictures, to validate on and look at (default: none)' \
  'The tiny family needs none of them: make demo'; exit 2; }
FAMILY = $(if $(MODEL),--model.init_args.family.model='$(MODEL)') --data.init_args.urls='$(DATA)' \
  $(if $(VAL),--data.init_args.val_urls='$(VAL)') $(ARGS)

distill-guidance-sd15: ## stage 1 of SD1.5: DATA='/data/laion/{00000..01999}.tar' [MODEL=folder, file or hub id]
distill-guidance-sdxl: ## the same for SDXL
distill-guidance-sd3: ## the same for SD3, and by MODEL=stabilityai/stable-diffusion-3.5-medium for 3.5
distill-guidance-sd15 distill-guidance-sdxl distill-guidance-sd3: distill-guidance-%: $(if $(DATA),$(STAMP))
	$(NEEDS_DATA)
	$(ICD) fit --config conf/base.yaml --config conf/model/$*.yaml --config conf/task/guidance_distillation.yaml \
	  --config conf/experiment/$*_guidance.yaml $(FAMILY)

train-sd15: ## stage 2, the paper's training, of SD1.5: the same, and GUIDED=stage 1's folder or released .pt file
train-sdxl: ## the same for SDXL
train-sd15 train-sdxl: train-%: $(if $(DATA),$(STAMP))
	$(NEEDS_DATA)
	$(ICD) fit --config conf/base.yaml --config conf/model/$*.yaml --config conf/experiment/$*_paper.yaml \
	  --model.init_args.family.guided_unet='$(or $(GUIDED),outputs/guidance-$*)' $(FAMILY)

train-sd3: $(if $(DATA),$(STAMP)) ## the same for SD3
	$(NEEDS_DATA)
	$(ICD) fit --config conf/base.yaml --config conf/model/sd3.yaml --config conf/experiment/sd3.yaml \
	  --model.init_args.family.guided_unet='$(or $(GUIDED),outputs/guidance-sd3)' $(FAMILY)

train-flux: $(if $(DATA),$(STAMP)) ## the same for FLUX.1-dev, which needs no stage 1: DATA=... [MODEL=folder or hub id]
	$(NEEDS_DATA)
	$(ICD) fit --config conf/base.yaml --config conf/model/flux_dev.yaml --config conf/experiment/flux_dev.yaml $(FAMILY)

eval-inversion: $(STAMP) ## to noise and back on held-out scenes: the tiny students and DDIM-50
	$(ICD) eval $(ARGS)

eval-generation: $(STAMP) ## pictures from drawn noise: Table 4
	$(ICD) eval --benchmark generation --method icd,untrained,ddim $(ARGS)

eval-guidance: $(STAMP) ## guidance while encoding and while decoding: Table 1, Fig. 4
	$(ICD) eval --benchmark guidance --method icd,ddim $(ARGS)

eval-editing: $(STAMP) ## edits with known true results, by every method
	$(ICD) eval --benchmark tiny_edit --method all $(ARGS)

ablations: $(SHAPES) ## Table 2, A to K, on the tiny family (about 20 minutes a seed)
	$(ICD) ablations $(ARGS)

notebooks: $(STAMP) ## execute notebooks/ on the shipped results, or on RESULTS=outputs; copies in outputs/notebooks
	@test -z "$(RESULTS)" || test -d "$(RESULTS)" || { echo 'there is no folder RESULTS=$(RESULTS)'; exit 2; }
	mkdir -p outputs/notebooks
	for name in ablations guidance; do ICD_RESULTS=$(if $(RESULTS),$(abspath $(RESULTS))) $(BIN)/jupyter-execute \
	  notebooks/$$name.ipynb --output ../outputs/notebooks/$$name $(ARGS) || exit; done

notebook-results: $(SHAPES) ## measure what the notebooks read, goes on where it stopped; to notebooks/results
	$(ICD) ablations --seeds 0,1,2
	$(ICD) eval --benchmark guidance --method icd,ddim
	$(ICD) eval --benchmark generation --grid 'tau1=0.2,0.4,0.6,0.8,1 tau2=0.4,0.6,0.8,1'
	rm -rf notebooks/results
	$(ICD) condense

outputs/demo/metrics.json: icd_lightning/weights/tiny/unet_guided/diffusion_pytorch_model.safetensors | $(STAMP)
	rm -rf outputs/demo # its training goes on with no other weights
	$(ICD) demo

outputs/demo-tiny_flow/metrics.json: icd_lightning/weights/tiny_flow/transformer/diffusion_pytorch_model.safetensors | $(STAMP)
	rm -rf outputs/demo-tiny_flow
	$(ICD) demo --family tiny_flow

figures: outputs/demo/metrics.json outputs/demo-tiny_flow/metrics.json notebook-results ## measure again what README, docs, card and notebooks show, and put it there (hours; goes on where it stopped)
	$(ICD) tiny jumps
	$(ICD) tiny jumps --model tiny_flow
	$(ICD) ablations --model tiny_flow
	$(ICD) eval --benchmark tiny_edit --method all --count 64
	$(ICD) eval --benchmark tiny_edit --method icd,icd_p2p,untrained,ddim_dynamic,npi,pnp_inversion,edit_friendly,infedit,sdedit \
	  --count 64 --grid "w=1.5,2,3,5" --out outputs/eval-trade-off
	$(ICD) eval --benchmark tiny_edit --method icd --count 64 --grid "w=3 tau=0.5,0.6,0.7,0.8,0.9,1" --out outputs/eval-tau
	$(ICD) eval --benchmark tiny_edit --model tiny_flow --count 64 --out outputs/eval-tiny_flow \
	  --method icd_swap,icd_p2p,untrained,ddim,flowedit,rf_solver_edit,fireflow,rf_inversion,uniedit_flow,sdedit
	$(ICD) eval --benchmark tiny_edit --model tiny_flow --method icd --count 64 --grid "w=3 tau=0.5,0.6,0.7,0.8,0.9,1" \
	  --out outputs/eval-tau-tiny_flow
	$(ICD) tiny report --card --count $(SCENES)
	$(ICD) tiny report --model tiny_flow --card --count $(SCENES)
	$(BIN)/python docs/hooks/figures.py

tensorboard: $(STAMP) ## look at all runs
	$(BIN)/tensorboard --logdir outputs $(ARGS)

TINY := $(ICD) fit --config conf/tiny/base.yaml
PICTURES ?= 65536
SCENES   ?= 512
WEIGHTS = outputs/$@
CACHE_LATENTS = $(ICD) data shapes --out $(WEIGHTS)/shards/pictures --count $(PICTURES) --shard_size 4096 --seed 3 && \
	$(ICD) data shapes --out $(WEIGHTS)/shards/pictures-val --count $(SCENES) --seed 5 && \
	for set in pictures pictures-val; do $(ICD) data cache-latents $(WEIGHTS)/shards/$$set \
	  --out $(WEIGHTS)/shards/latents$${set#pictures} --batch_size 64 --vae
tiny-weights: $(SHAPES) ## train the shipped tiny family from nothing (hours; goes on where it stopped)
	$(TINY) --config conf/tiny/autoencoder.yaml $(ARGS)
	$(TINY) --config conf/tiny/scene_network.yaml $(ARGS)
	$(CACHE_LATENTS) $(WEIGHTS)/model/vae || exit; done
	$(TINY) --config conf/tiny/teacher.yaml $(ARGS)
	$(TINY) --config conf/tiny/guidance.yaml $(ARGS)
	$(ICD) fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/experiment/tiny.yaml \
	  --config conf/tiny/students.yaml $(ARGS)
	$(ICD) tiny package
	$(ICD) tiny report --card --count $(SCENES)

tiny-flow-weights: $(SHAPES) ## train tiny_flow, on tiny's autoencoder and text encoder (hours; goes on where it stopped)
	$(CACHE_LATENTS) icd_lightning/weights/tiny/vae || exit; done
	$(TINY) --config conf/tiny_flow/teacher.yaml $(ARGS)
	$(ICD) fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/model/tiny_flow.yaml \
	  --config conf/experiment/tiny_flow.yaml --config conf/tiny_flow/students.yaml $(ARGS)
	$(ICD) tiny package --family tiny_flow
	$(ICD) tiny report --model tiny_flow --card --count $(SCENES)

tiny-report: $(STAMP) ## measure the shipped family against its bars, on other held-out scenes with ARGS='--seed 7'
	$(ICD) tiny report $(ARGS)

gpu-figures: $(STAMP) ## every figure that takes a GPU, in 8 minutes, to outputs/gpu; ARGS='--peer ../invertible-cd'
	$(BIN)/python benchmarks/gpu.py $(ARGS)

docs: $(STAMP) ## build the documentation as a site, build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo 'build/site/index.html is written; to search it, serve it: $(BIN)/python -m http.server --directory build/site'

clean: ## remove what the demo and the trainings wrote, and the environment
	rm -rf outputs $(VENV)
