#!/usr/bin/env bash
# Several machines with a shared output_dir and cache.path. Run this on each; HEAD is the first one's address.
# A machine that is lost ends the step for all; torchrun starts all of them anew from the last checkpoint.
torchrun --nnodes="${NODES:-2}" --nproc-per-node=gpu --max-restarts=10 \
  --rdzv-backend=c10d --rdzv-id="${RUN:-sdxl}" --rdzv-endpoint="${HEAD:?address of the first machine}:29400" \
  -m sdxl_trainer train config.toml train.shard=true
