#!/usr/bin/env bash
# One machine, all of its GPUs. Killed or not: the same command continues from the last checkpoint.
torchrun --standalone --nproc-per-node=gpu --max-restarts=3 -m sdxl_trainer train config.toml
