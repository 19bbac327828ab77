"""Train the VAE of micro-SDXL on pictures of the toy world, from random weights, on one CPU thread.

    python recipes/micro/train_vae.py OUT [--config recipes/micro/vae.toml]

The same command resumes: what step k sees is a function of (seed, k) alone, so an interrupted run ends in the same
bits. OUT gets `log.jsonl`, `checkpoint.safetensors`, `sheet-*.png` and, at the end, `final/`, a diffusers folder.
"""

import argparse
import json
import math
import os
import shutil
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import toyworld
from toyworld import score

Config = dict[str, Any]

AREA = 128 * 128  # pixels of a picture of the class that micro-SDXL is made for
# (height, width) of whole pictures: all of about that area, in steps of the latent cell
BUCKETS = ((128, 128), (128, 128), (112, 144), (144, 112), (104, 152), (152, 104), (104, 160), (160, 104))
ZOOMS = (1.0, 1.0, 0.75, 1.5)  # sizes at which pictures are drawn, as parts of the size at which they are seen
_PIXELS, _NOISE = 1, 2  # purposes of a random draw


def uniform(seed: int, purpose: int, index: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on the arguments alone."""
    bits = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, purpose], np.uint64))
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def picture(scene: toyworld.Scene, size: tuple[int, int], u: float) -> np.ndarray:
    """`scene` at `size` (height, width), `[h, w, 3]`: drawn there, or by `u` in [0, 1) elsewhere and resized."""
    zoom = ZOOMS[int(u * len(ZOOMS))]
    if zoom == 1:
        return toyworld.draw(scene, size)
    drawn = Image.fromarray(toyworld.draw(scene, (round(size[0] * zoom), round(size[1] * zoom))))
    return np.asarray(drawn.resize((size[1], size[0]), Image.Resampling.LANCZOS))


def window(seed: int, index: int, crop: int) -> np.ndarray:
    """A window `[crop, crop, 3]` that shows some of an object of scene `index`, drawn at about the class's area."""
    u = uniform(seed, _PIXELS, index, 4)
    scene = toyworld.scene(seed, index)
    scale = math.sqrt(AREA / (scene.size[0] * scene.size[1]))
    size = (round(scene.size[0] * scale), round(scene.size[1] * scale))
    pixels = picture(scene, size, u[0])
    thing = scene.things[int(u[1] * len(scene.things))]
    corner = []
    for middle, side, shift in zip(reversed(thing.at), size, u[2:], strict=True):
        start = round(middle * side - crop / 2 + (shift - 0.5) * 0.9 * crop)
        corner.append(min(max(start, 0), side - crop))
    return pixels[corner[0] : corner[0] + crop, corner[1] : corner[1] + crop]


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 `[h, w, 3]` pictures of one size -> float32 `[B, 3, h, w]` in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pictures(tensor: Tensor) -> list[np.ndarray]:
    """`[B, 3, h, w]` in -1..1 -> uint8 `[h, w, 3]` pictures."""
    pixels = tensor.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).numpy())


def phase_of(config: Config, step: int) -> tuple[int, int, int]:
    """(batch, crop, index of the first picture) of a step."""
    first = 0
    for phase in config["phase"]:
        if step < phase["steps"]:
            return phase["batch"], phase["crop"], first + step * phase["batch"]
        step -= phase["steps"]
        first += phase["steps"] * phase["batch"]
    raise ValueError("the step lies behind the last phase")


def batch_of(config: Config, step: int) -> Tensor:
    """The pictures of a step, `[B, 3, h, w]` in -1..1; a crop of 0 stands for whole pictures of one bucket."""
    count, crop, first = phase_of(config, step)
    indices = range(first, first + count)
    if crop:
        return to_tensor([window(config["seed"], index, crop) for index in indices])
    u = uniform(config["seed"], _PIXELS, first, 1 + count)
    size = BUCKETS[int(u[0] * len(BUCKETS))]
    scenes = [toyworld.scene(config["seed"], index) for index in indices]
    return to_tensor([picture(s, size, u[1 + i]) for i, s in enumerate(scenes)])


def new_model(config: Config) -> AutoencoderKL:
    """The architecture with random weights that let every residual block begin as the identity."""
    torch.manual_seed(config["seed"])
    channels = config["model"]["block_out_channels"]
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        latent_channels=4,
        sample_size=128,
        mid_block_add_attention=False,
        **config["model"],
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
    with torch.no_grad():  # a posterior of little noise, so that pictures are learned before their compression
        model.quant_conv.weight[4:] = 0
        model.quant_conv.bias[4:] = -5
    return model


def loss_of(model: AutoencoderKL, config: Config, step: int) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step and its parts: pixel errors are means over pixels, the divergence over latent numbers."""
    x = batch_of(config, step)
    posterior = model.encode(x).latent_dist
    noise = torch.Generator().manual_seed(int(uniform(config["seed"], _NOISE, step, 1)[0] * 2**53))
    error = model.decode(posterior.sample(generator=noise)).sample - x
    absolute, squared = error.abs().mean(), error.square().mean()
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = absolute + config["loss"]["squared"] * squared + config["loss"]["kl"] * divergence
    return loss, {"absolute": absolute.item(), "squared": squared.item(), "divergence": divergence.item()}


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Linear warm-up, a plateau (so that a longer run begins like a shorter one), then half a cosine to zero."""
    settings = config["optimizer"]
    warm = min(1.0, (step + 1) / settings["warmup"])
    late = max(0.0, (step - settings["decay_from"]) / (steps - settings["decay_from"]))
    return settings["learning_rate"] * warm * 0.5 * (1 + math.cos(math.pi * late))


def evaluation_set(config: Config, count: int) -> Iterator[tuple[list[toyworld.Scene], list[np.ndarray]]]:
    """(scenes, pictures) bucket by bucket: `count` scenes never trained on, half of them resized."""
    for number, size in enumerate(BUCKETS):
        indices = range(number, count, len(BUCKETS))
        scenes = [toyworld.scene(config["evaluation"]["seed"], index) for index in indices]
        yield scenes, [picture(scene, size, i % len(ZOOMS) / len(ZOOMS)) for i, scene in enumerate(scenes)]


@torch.no_grad()
def evaluate(model: AutoencoderKL, config: Config, count: int, sheet: Path | None = None) -> dict[str, Any]:
    """PSNR (mean over pictures, dB) and the scorer's accuracy after a round trip through the means of the posterior."""
    psnr, scenes, rebuilt, pairs = [], [], [], []
    for some, pictures in evaluation_set(config, count):
        back = to_pictures(model.decode(model.encode(to_tensor(pictures)).latent_dist.mode()).sample)
        for before, after in zip(pictures, back, strict=True):
            error = np.square((before.astype(np.float64) - after) / 255).mean()
            psnr.append(-10 * math.log10(max(float(error), 1e-10)))
        scenes += some
        rebuilt += back
        pairs += [side for both in list(zip(pictures, back, strict=True))[:4] for side in both]
    if sheet:
        toyworld.sheet(pairs, columns=8, cell=160).save(sheet)
    rates = score.accuracy(rebuilt, scenes)
    return {
        "psnr": round(float(np.mean(psnr)), 3),
        "psnr_5th_percentile": round(float(np.quantile(psnr, 0.05)), 3),
        "accuracy": {name: round(rate.rate, 4) for name, rate in rates.items()},
        "low": {name: round(rate.low, 4) for name, rate in rates.items()},
        "pictures": len(scenes),
    }


@torch.no_grad()
def center(model: AutoencoderKL, config: Config, count: int) -> dict[str, Any]:
    """Give each channel of the latents zero mean and one common deviation, whose inverse is the scaling factor.

    The 1x1 convolutions on both sides of the latents take the change in, so that decoded pictures stay what they are.
    """
    found = [model.encode(to_tensor(pictures)).latent_dist for _, pictures in evaluation_set(config, count)]
    flat = torch.cat([p.mean.transpose(0, 1).flatten(1) for p in found], 1).double()
    noise = torch.cat([p.std.transpose(0, 1).flatten(1) for p in found], 1).double().square().mean(1).sqrt()
    mean, deviation = flat.mean(1), flat.std(1)
    common = deviation.square().mean().sqrt()
    gain = (common / deviation).float()
    inward, outward = model.quant_conv, model.post_quant_conv
    outward.bias += outward.weight[:, :, 0, 0] @ mean.float()
    outward.weight /= gain[None, :, None, None]
    inward.bias[:4] -= mean.float()
    inward.bias[:4] *= gain
    inward.weight[:4] *= gain[:, None, None, None]
    inward.bias[4:] += 2 * gain.log()
    model.register_to_config(scaling_factor=round(1 / common.item(), 5))
    return {
        "scaling_factor": model.config.scaling_factor,
        "channel_means_before": [round(v, 4) for v in mean.tolist()],
        "channel_deviations_before": [round(v, 4) for v in deviation.tolist()],
        "posterior_noise": [round(v, 4) for v in (noise / deviation).tolist()],
    }


def save_checkpoint(path: Path, model: AutoencoderKL, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and moments in one file, whole or absent."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for index, (name, _) in enumerate(model.named_parameters()):
        state = optimizer.state_dict()["state"][index]
        tensors |= {f"{kind}.{name}": state[kind].contiguous() for kind in ("exp_avg", "exp_avg_sq")}
    part = path.with_suffix(".part")
    save_file(tensors, part, {"step": str(step)})
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(path)


def load_checkpoint(path: Path, model: AutoencoderKL, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint back; returns the number of steps done."""
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        model.load_state_dict({name: file.get_tensor(f"model.{name}") for name in model.state_dict()})
        state = {
            index: {kind: file.get_tensor(f"{kind}.{name}") for kind in ("exp_avg", "exp_avg_sq")}
            | {"step": torch.tensor(float(step))}
            for index, (name, _) in enumerate(model.named_parameters())
        }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def cut_log(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: those steps are taken again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def finish(model: AutoencoderKL, config: Config, out: Path, steps: int) -> dict[str, Any]:
    """Center the latents, measure, and write the diffusers folder."""
    result: dict[str, Any] = {"step": steps, **center(model, config, config["evaluation"]["centering_pictures"])}
    result |= evaluate(model, config, config["evaluation"]["final_pictures"], out / "sheet-final.png")
    part = out / "final.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    (part / "measured.json").write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out / "final")
    return result


def train(config: Config, out: Path) -> None:
    """All steps that are not yet done, then the final folder."""
    steps = sum(phase["steps"] for phase in config["phase"])
    model = new_model(config)
    settings = config["optimizer"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=tuple(settings["betas"]), fused=True)
    checkpoint, log_path = out / "checkpoint.safetensors", out / "log.jsonl"
    start = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    cut_log(log_path, start)
    began = time.monotonic()

    def log(row: dict[str, Any]) -> None:
        with log_path.open("a") as file:
            file.write(json.dumps(row | {"seconds": round(time.monotonic() - began, 1)}) + "\n")

    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        loss, parts = loss_of(model, config, step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {step}: the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        done = step + 1
        if done % config["log_every"] == 0:
            log({"step": done, "loss": loss.item(), **parts, "gradient_norm": norm.item()})
        if done % config["evaluate_every"] == 0 or done == steps:
            log({"step": done, **evaluate(model, config, config["evaluation"]["pictures"], out / "sheet.png")})
        if done % config["checkpoint_every"] == 0 or done == steps:
            save_checkpoint(checkpoint, model, optimizer, done)
    log(finish(model, config, out, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("vae.toml"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one thread: the sums, and so the weights, are then the same at every run
    arguments.out.mkdir(parents=True, exist_ok=True)
    if (arguments.out / "final").exists():
        print(f"{arguments.out / 'final'} is there already")
        return
    train(tomllib.loads(arguments.config.read_text()), arguments.out)


if __name__ == "__main__":
    main()
