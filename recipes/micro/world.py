"""How fast the toy world draws, and how surely its pictures are read, as drawn and after a round trip through a VAE.

    python recipes/micro/world.py [MODEL] [--scenes 1000] [--out recipes/micro/logs/world.json]

The scenes are of a world that the reader was not tuned on, of all sizes and aspect ratios, a quarter of them with two
objects; the VAE of MODEL (default: the one that comes with the package) sees them at the nearest multiple of 8 pixels.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

import toyworld
from sdxl_trainer.demo import BASE
from toyworld import score

SEED = 9301  # neither a training picture nor a test is of this world
CELL = 8  # pixels a side of a latent cell


@torch.no_grad()
def coded(vae: Any, picture: np.ndarray) -> np.ndarray:
    """A picture [h, w, 3] after the VAE has encoded and decoded it."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
    return back.permute(1, 2, 0).add(1).mul(127.5).round().clamp(0, 255).numpy().astype(np.uint8)


def rates(pictures: list[np.ndarray], scenes: list[toyworld.Scene]) -> dict[str, dict[str, float]]:
    """Accuracy of each attribute with its 95 % interval and what guessing would give."""
    found = score.accuracy(pictures, scenes)
    print(score.table(found))
    return {name: {"rate": rate.rate} | dataclasses.asdict(rate) for name, rate in found.items()}


def measured(model: Path, count: int) -> dict[str, Any]:
    """Pictures a second on one core, and both tables."""
    torch.set_num_threads(1)
    scenes = [toyworld.scene(SEED, index) for index in range(count)]
    began = time.process_time()
    pictures = [toyworld.draw(scene) for scene in scenes]
    speed = count / (time.process_time() - began)
    print(f"{count} scenes of {sorted({scene.size for scene in scenes})}: {speed:.0f} a second\n\nas drawn")
    drawn = rates(pictures, scenes)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    print("\nafter a round trip through the VAE")
    sizes = [tuple(round(side / CELL) * CELL for side in scene.size) for scene in scenes]
    fitted = [toyworld.draw(scene, size) for scene, size in zip(scenes, sizes, strict=True)]
    back = rates([coded(vae, picture) for picture in fitted], scenes)
    return {"scenes": count, "pictures_per_cpu_second": round(speed), "drawn": drawn, "through_the_vae": back}


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the toy world draws, and how surely it is read.")
    parser.add_argument("model", type=Path, nargs="?", default=BASE)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "logs" / "world.json")
    arguments = parser.parse_args()
    found = measured(arguments.model, arguments.scenes)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
