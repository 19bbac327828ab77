"""Seconds per sample of kohya's cached rows, by its own functions from a checkout of sd-scripts. Started by `peers.py`:

    python benchmarks/kohya.py SD_SCRIPTS FOLDER [--samples 16] [--batches 64] [--batch 4]

Written and read are latents and text at the shapes of SDXL at 1024 pixels, and put together as its data set does. What
the data set does around that (captions, random choices, sizes) is left out, which is in its favour.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import launch
import numpy as np
import torch

SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    launch.declare_torchvision()
    sys.path.insert(0, str(options.checkout))
    from library.strategy_base import LatentsCachingStrategy
    from library.strategy_sdxl import SdxlTextEncoderOutputsCachingStrategy

    latents = LatentsCachingStrategy(True, 1, False)
    texts = SdxlTextEncoderOutputsCachingStrategy(True, 1, False)
    for number in range(options.samples):
        write(latents, options.folder, number)
    read(latents, texts, options, 1)
    began = time.perf_counter()
    read(latents, texts, options, options.batches)
    print(json.dumps((time.perf_counter() - began) / (options.batches * options.batch)))


def write(latents: Any, folder: Path, number: int) -> None:
    """One picture's files, with the names inside that kohya gives them."""
    draw = torch.Generator().manual_seed(number)
    cells = SIDE // 8
    moments = torch.randn(4, cells, cells, generator=draw)
    size, crop = (SIDE, SIDE), (0, 0, SIDE, SIDE)
    path = str(folder / f"{number}.npz")
    latents.save_latents_to_disk(path, moments, size, crop, key_reso_suffix=f"_{cells}x{cells}")
    shapes = {"hidden_state1": (77, 768), "hidden_state2": (77, 1280), "pool2": (1280,)}
    rows = {name: torch.randn(shape, generator=draw).numpy() for name, shape in shapes.items()}
    np.savez(folder / f"{number}_text.npz", **rows)


def read(latents: Any, texts: Any, options: argparse.Namespace, batches: int) -> None:
    for batch in range(batches):
        rows, said = [], []
        for place in range(options.batch):
            number = (batch * options.batch + place) % options.samples
            found = latents._default_load_latents_from_disk(8, str(options.folder / f"{number}.npz"), (SIDE, SIDE))
            rows.append(torch.FloatTensor(found[0]))
            said.append(texts.load_outputs_npz(str(options.folder / f"{number}_text.npz")))
        torch.stack(rows)
        for column in zip(*said, strict=True):
            torch.stack([torch.FloatTensor(row) for row in column])


if __name__ == "__main__":
    main()
