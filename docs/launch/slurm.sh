#!/usr/bin/env bash
#SBATCH --job-name=sdxl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
# --signal: five minutes before the end all processes are asked to stop; they save after the step they are in.
# --requeue: a job that was preempted is queued again, and continues.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=gpu \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29400" \
  -m sdxl_trainer train config.toml train.shard=true
