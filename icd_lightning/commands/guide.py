"""What `icd fit --help` says: how to use it, at once. `icd fit --help_all` imports everything and lists every key."""

FIT = """\
usage: icd fit --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

Train. Configurations are laid one over the other, each holding only what it changes; keys come last.

  conf/base.yaml            both students at once, by the paper's recipe: what comes first in every training of stage 2
  conf/model/               the networks, and what suits them: tiny (shipped), tiny_flow, sd15, sdxl, sd3, sd35_medium,
                            flux_dev, flux2_klein, z_image
  conf/experiment/          length, batch and folder: demo, tiny, tiny_flow, sd15_paper, sdxl_paper, flux_dev; and
                            sd15_guidance, sdxl_guidance of stage 1
  conf/trainer/             how devices share the work: single, ddp, fsdp; and compile. docs/gpus.md tells more
  conf/logger/              wandb: Weights & Biases beside TensorBoard. docs/loggers.md tells more
  conf/ablation/            rows of the paper's Table 2: A ... K
  conf/task/                guidance_distillation: stage 1 in the place of stage 2
  conf/tiny/, tiny_flow/    the stages of `make tiny-weights` and `make tiny-flow-weights`, after conf/tiny/base.yaml

Train
  icd data shapes --out data/shapes/train --count 20000; icd data shapes --out data/shapes/val --count 512 --seed 6
  icd fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/experiment/tiny.yaml
An ablation, in a folder of its own
  icd fit --config conf/base.yaml --config conf/model/tiny.yaml --config conf/experiment/tiny.yaml \\
    --config conf/ablation/F.yaml --trainer.default_root_dir outputs/F
Stage 1: the guidance-distilled UNet that stage 2 names in family.guided_unet
  icd fit --config conf/base.yaml --config conf/model/sd15.yaml --config conf/task/guidance_distillation.yaml

Change a value
  --trainer.max_steps 500  --data.init_args.batch_size 8  --model.init_args.optimizer.lr 1e-4
  --model.init_args.losses.forward_preservation null   leave a loss out
  --model.init_args.losses.forward_preservation.init_args.weight 1              weigh it
  --model.init_args.students.init_args.reverse FOLDER  begin with this model; with null for both of its losses, which
    are reverse_cd and reverse_preservation, the forward model learns its inverse
  --trainer.callbacks+=icd_lightning.callbacks.averaging.ExponentialAverage     validate and export averaged weights
  --model.init_args.seed 1 --data.init_args.seed 1     other noise, and another order of the data
Keys may stand in a file as well: that is an overlay.

Look
  --print_config, after the others: the composed configuration
  --model.help CLASS, --data.help CLASS: the arguments of a class, e.g. of
    icd_lightning.tasks.invertible_consistency.InvertibleConsistencyDistillation
  --help_all: every key

Go on
  trainer.default_root_dir holds the run: config.yaml, checkpoints/, TensorBoard's log, and at the end forward/ and
  reverse/. Ctrl-C stops after a step that it saves. The same command goes on from the last checkpoint there
  (ckpt_path: last, in conf/base.yaml); with a larger --trainer.max_steps, further. In another folder it starts anew.
"""

OTHER = """\
usage: icd {name} --config FILE [--config OVERLAY ...] [--KEY VALUE ...]

Run a task's {name} step over data.init_args.val_urls, with the run's last checkpoint (--ckpt_path FILE for another), on
trainer.limit_{batches}_batches batches, and reconstruct as many pictures as its callback says.
Takes what `icd fit` takes: see `icd fit --help`.

  icd {name} --config outputs/train-tiny/config.yaml
"""

GUIDES = {
    "fit": FIT,
    "validate": OTHER.format(name="validate", batches="val"),
    "test": OTHER.format(name="test", batches="test"),
}
