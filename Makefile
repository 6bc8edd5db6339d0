# icd_lightning: the commands people use. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ICD    := $(BIN)/icd
STAMP  := $(VENV)/.installed
MODEL  ?=
GUIDED ?=
DATA   ?=
ARGS   ?=

# Two busy cores: threads that sleep while they wait leave the core to whoever has work.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint train-tiny train-sd15 eval-inversion tensorboard tiny-weights tiny-report clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv with everything in it (every other target does so first)

demo: $(STAMP) ## distil, invert, generate and edit with the tiny family; results in outputs/demo
	$(ICD) demo $(ARGS)

test: $(STAMP) ## the fast tests, as CI runs them
	$(BIN)/python -m pytest $(ARGS)

test-all: $(STAMP) ## all tests, the slow ones too
	$(BIN)/python -m pytest -m '' $(ARGS)

lint: $(STAMP) ## ruff, and mypy on the mathematics
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

data/shapes/train/manifest.json: | $(STAMP)
	$(ICD) data shapes --out data/shapes/train --count 20000 --seed 0

data/shapes/val/manifest.json: | $(STAMP)
	$(ICD) data shapes --out data/shapes/val --count 512 --seed 1

train-tiny: data/shapes/train/manifest.json data/shapes/val/manifest.json ## train both tiny students longer; results in outputs/train-tiny
	$(ICD) fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/experiment/tiny.yaml $(ARGS)

train-sd15: $(STAMP) ## the paper's SD1.5 training: MODEL=folder GUIDED=stage-1 UNet DATA='shards/{00000..00099}.tar'
	@test -n "$(MODEL)" -a -n "$(GUIDED)" -a -n "$(DATA)" || { printf '%s\n' \
	  'make train-sd15 needs what does not come with this repository:' \
	  '  MODEL=$(or $(MODEL),?)   folder of Stable Diffusion 1.5 in diffusers layout (unet, vae, text_encoder, ...)' \
	  '  GUIDED=$(or $(GUIDED),?)   folder of the guidance-distilled UNet (stage 1; conf/task/guidance_distillation.yaml trains it)' \
	  '  DATA=$(or $(DATA),?)   WebDataset shards of pictures and captions, e.g. /data/laion/{00000..01999}.tar' \
	  'The tiny family needs none of them: make demo'; exit 2; }
	$(ICD) fit --config conf/base.yaml --config conf/model/sd15.yaml --config conf/experiment/sd15_paper.yaml \
	  $(if $(MODEL),--model.init_args.family.model='$(MODEL)') \
	  $(if $(GUIDED),--model.init_args.family.guided_unet='$(GUIDED)') \
	  $(if $(DATA),--data.init_args.urls='$(DATA)') $(ARGS)

eval-inversion: $(STAMP) ## to noise and back on held-out scenes: the tiny students and DDIM-50
	$(ICD) eval $(ARGS)

tensorboard: $(STAMP) ## look at all runs
	$(BIN)/tensorboard --logdir outputs $(ARGS)

TINY := $(ICD) fit --config conf/tiny/base.yaml
TINY_SHARDS := outputs/tiny-weights/shards
tiny-weights: data/shapes/train/manifest.json data/shapes/val/manifest.json ## train the shipped tiny family from nothing (hours; goes on where it stopped)
	$(TINY) --config conf/tiny/autoencoder.yaml
	$(TINY) --config conf/tiny/scene_network.yaml
	$(ICD) data shapes --out $(TINY_SHARDS)/pictures --count 65536 --shard_size 4096 --seed 3
	$(ICD) data shapes --out $(TINY_SHARDS)/pictures-val --count 512 --seed 5
	for set in pictures pictures-val; do $(ICD) data cache-latents $(TINY_SHARDS)/$$set \
	  --out $(TINY_SHARDS)/latents$${set#pictures} --vae outputs/tiny-weights/model/vae --batch_size 64 || exit; done
	$(TINY) --config conf/tiny/teacher.yaml
	$(TINY) --config conf/tiny/guidance.yaml
	$(ICD) fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/experiment/tiny.yaml \
	  --config conf/tiny/students.yaml
	$(ICD) tiny package
	$(ICD) tiny report --card

tiny-report: $(STAMP) ## measure the shipped family against its bars, on other held-out scenes with ARGS='--seed 7'
	$(ICD) tiny report $(ARGS)

clean: ## remove what the demo and the trainings wrote, and the environment
	rm -rf outputs $(VENV)
