"""Change pictures with a trained micro-SDXL, by stock diffusers: image-to-image, and inpainting under a mask.

    python recipes/micro/edit.py MODEL [--pictures 100] [--strength 0.5] [--out FOLDER]

Drawn scenes are given, and the same scenes in another colour asked for (image-to-image), or with another object in
the same place (inpainting). Writes `edits.json` and two sheets, rows of given and returned pictures.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image

import toyworld
from toyworld import score
from toyworld.palette import VISIBLE

SIDE = 128
SCENES_SEED = 9101  # no training picture is of this world
MASK = 0.2  # half the side of the square that is painted anew, around the object's place, as a part of the picture
SHOWN = 16


def recoloured(scene: toyworld.Scene) -> toyworld.Scene:
    """The scene with its object in the next colour that can be seen on its background."""
    (thing,) = scene.things
    colours = VISIBLE[scene.background]
    colour = colours[(colours.index(thing.colour) + 1) % len(colours)]
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, colour=colour),))


def reshaped(scene: toyworld.Scene) -> toyworld.Scene:
    """The scene with the next shape, in the next colour, in the same place."""
    (thing,) = recoloured(scene).things
    shapes = tuple(toyworld.BASE_SHAPES)
    shape = shapes[(shapes.index(thing.shape) + 1) % len(shapes)]
    return dataclasses.replace(scene, things=(dataclasses.replace(thing, shape=shape, size="small"),))


def mask(scene: toyworld.Scene) -> Image.Image:
    """White where the picture is to be painted anew, black where it is to be kept."""
    x, y = (round(part * SIDE) for part in toyworld.PLACES[scene.things[0].place])
    half = round(MASK * SIDE)
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    pixels[max(0, y - half) : y + half, max(0, x - half) : x + half] = 255
    return Image.fromarray(pixels)


def run(pipeline: Any, number: int, prompt: str, **given: Any) -> np.ndarray:
    """One picture [128, 128, 3]; its noise depends on its number alone."""
    drawn = pipeline(
        prompt, num_inference_steps=50, guidance_scale=4.0, generator=torch.Generator().manual_seed(number), **given
    ).images[0]
    return np.asarray(drawn)


def rates(pictures: list[np.ndarray], scenes: list[toyworld.Scene]) -> dict[str, float]:
    return {name: round(rate.rate, 4) for name, rate in score.accuracy(pictures, scenes).items()}


def image_to_image(model: Path, count: int, strength: float, out: Path) -> dict[str, Any]:
    """Share of pictures that are as asked: the colour changed, place and shape and background kept."""
    pipeline: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [toyworld.scene(SCENES_SEED, index, count=1) for index in range(count)]
    given = [toyworld.draw(scene, (SIDE, SIDE)) for scene in scenes]
    wanted = [recoloured(scene) for scene in scenes]
    words = [toyworld.caption(scene, SCENES_SEED, index) for index, scene in enumerate(wanted)]
    returned = [
        run(pipeline, i, words[i], image=Image.fromarray(picture), strength=strength) for i, picture in enumerate(given)
    ]
    pairs = [picture for pair in zip(given[:SHOWN], returned[:SHOWN], strict=True) for picture in pair]
    toyworld.sheet(pairs, [w for i in range(min(SHOWN, count)) for w in ("given", words[i])]).save(out / "img2img.png")
    return {"strength": strength, "right": rates(returned, wanted)}


def inpainting(model: Path, count: int, out: Path) -> dict[str, Any]:
    """Share of pictures that are as asked, and the mean absolute difference of pixels (0..255) more than 8 pixels
    outside the mask: to the given picture, and to that picture after a round trip through the VAE alone."""
    pipeline: Any = StableDiffusionXLInpaintPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [toyworld.scene(SCENES_SEED, index, count=1) for index in range(count)]
    given = [toyworld.draw(scene, (SIDE, SIDE)) for scene in scenes]
    wanted = [reshaped(scene) for scene in scenes]
    words = [toyworld.caption(scene, SCENES_SEED, index) for index, scene in enumerate(wanted)]
    returned, moved, coded = [], [], []
    for index, (scene, picture) in enumerate(zip(scenes, given, strict=True)):
        painted = mask(scene)
        asked = {"mask_image": painted, "strength": 1.0, "height": SIDE, "width": SIDE}
        returned.append(run(pipeline, index, words[index], image=Image.fromarray(picture), **asked))
        near = np.asarray(painted.resize((SIDE // 8, SIDE // 8), Image.Resampling.BOX)) > 0
        far = ~np.kron(_grown(near), np.ones((8, 8), bool))
        moved.append(np.abs(returned[-1].astype(float) - picture)[far].mean())
        coded.append(np.abs(_coded(pipeline, picture).astype(float) - picture)[far].mean())
    pairs = [picture for pair in zip(given[:SHOWN], returned[:SHOWN], strict=True) for picture in pair]
    toyworld.sheet(pairs, [w for i in range(min(SHOWN, count)) for w in ("given", words[i])]).save(out / "inpaint.png")
    outside = {"difference": round(float(np.mean(moved)), 3), "by_the_vae_alone": round(float(np.mean(coded)), 3)}
    return {"right": rates(returned, wanted), "outside": outside | {"largest": round(float(np.max(moved)), 3)}}


def _grown(cells: np.ndarray) -> np.ndarray:
    """The cells and their neighbours."""
    padded = np.pad(cells, 1)
    height, width = cells.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


@torch.no_grad()
def _coded(pipeline: Any, picture: np.ndarray) -> np.ndarray:
    pixels = pipeline.image_processor.preprocess(Image.fromarray(picture))
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return (pipeline.image_processor.postprocess(decoded, output_type="np")[0] * 255).round()


def main() -> None:
    parser = argparse.ArgumentParser(description="Change pictures with a micro-SDXL and count what is right in them.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    out = settings.out or settings.model / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "pictures": settings.pictures,
        "image_to_image": image_to_image(settings.model, settings.pictures, settings.strength, out),
        "inpainting": inpainting(settings.model, settings.pictures, out),
    }
    (out / "edits.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
