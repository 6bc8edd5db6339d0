#!/bin/bash
# Stage 2 for SD1.5 on 2 x 8 GPUs of a SLURM cluster, requeued when its time is up or it is preempted:
#   sbatch docs/slurm.sh /data/sd15 /data/guidance-sd15 '/data/laion/{00000..01999}.tar' /data/laion-val
#SBATCH --job-name=icd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Ten minutes before the end: the step is finished and saved, the job requeued, and goes on from checkpoints/last.ckpt.
#SBATCH --signal=SIGUSR1@600
set -eu
export OMP_NUM_THREADS=1

# Lightning's SLURM plugin reads ranks and addresses from srun: one task for each GPU, and no torchrun.
srun .venv/bin/icd fit \
  --config conf/base.yaml --config conf/model/sd15.yaml --config conf/experiment/sd15_paper.yaml \
  --config conf/trainer/ddp.yaml \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.default_root_dir outputs/train-sd15 \
  --model.init_args.family.model "$1" --model.init_args.family.guided_unet "$2" --data.init_args.urls "$3" \
  ${4:+--data.init_args.val_urls "$4"}
