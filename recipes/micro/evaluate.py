"""Ask a trained micro-SDXL for pictures with stock diffusers, and count what is right in them.

    python recipes/micro/evaluate.py MODEL [--prompts 500] [--out FOLDER]

Every second prompt is a combination of shape, colour and place that no training picture shows. Writes `result.json`
and `sheet.png`, the first 64 pictures with their prompts, into FOLDER (default: MODEL/evaluation).
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

import toyworld
from toyworld import score

SIDE = 128
PROMPTS_SEED = 9001  # no training picture is of this world
SHOWN = 64


def pictures(pipeline: Any, prompts: list[str], settings: argparse.Namespace) -> list[np.ndarray]:
    """One picture [128, 128, 3] for each prompt; the noise of a picture depends on its number alone."""
    found: list[np.ndarray] = []
    for start in range(0, len(prompts), settings.batch):
        asked = prompts[start : start + settings.batch]
        drawn = pipeline(
            asked,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            height=SIDE,
            width=SIDE,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(asked))],
            output_type="np",
        ).images
        found += list((drawn * 255).round().astype(np.uint8))
    return found


def rates(images: list[np.ndarray], scenes: list[toyworld.Scene]) -> dict[str, dict[str, float]]:
    """Accuracy of each attribute with its 95 % interval and what guessing would give."""
    return {
        name: {"rate": round(found.rate, 4)} | {k: round(v, 4) for k, v in dataclasses.asdict(found).items()}
        for name, found in score.accuracy(images, scenes).items()
    }


def evaluate(settings: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Draw, score, and write the sheet."""
    began = time.monotonic()
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        settings.model, dtype=torch.float32, add_watermarker=False
    ).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    single = toyworld.prompts(settings.prompts, PROMPTS_SEED)
    double = toyworld.prompts(settings.pairs, PROMPTS_SEED, count=2)
    images = pictures(pipeline, [words for _, words in [*single, *double]], settings)
    alone, pairs = images[: len(single)], images[len(single) :]
    scenes = [scene for scene, _ in single]
    toyworld.sheet(alone[:SHOWN], [words for _, words in single[:SHOWN]]).save(out / "sheet.png")
    print(score.table(score.accuracy(alone, scenes)))
    result = {
        "prompts": settings.prompts,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "all": rates(alone, scenes),
        "held_out": rates(alone[::2], scenes[::2]),
        "seen": rates(alone[1::2], scenes[1::2]),
    }
    if pairs:
        result["two_objects"] = rates(pairs, [scene for scene, _ in double])
    return result | {"seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what is right in the pictures of a micro-SDXL.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=500, help="prompts of one object")
    parser.add_argument("--pairs", type=int, default=0, help="prompts of two objects and their relation")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    out = settings.out or settings.model / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    result = evaluate(settings, out)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
