"""From cached rows to the batches of a step. Every random choice about a sample is made here, by law 1."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdxl_trainer import keyed, noise
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Inpainting, Objective
from sdxl_trainer.data import cache, holes, masks, plan
from sdxl_trainer.data.captions import Choice
from sdxl_trainer.data.encode import Keys
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.pictures import Picture
from sdxl_trainer.data.words import Text, Words
from sdxl_trainer.model import LatentScale
from sdxl_trainer.threads import mapped
from sdxl_trainer.timesteps import Clock

T = TypeVar("T")

# Steps prepared ahead of the one that trains.
AHEAD = 2
# Samples of a batch whose rows are fetched at a time, where they are not on this machine.
FAR = 32


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples with latents of size h x w. All random numbers are already drawn."""

    names: tuple[str, ...]
    mean: Tensor  # [B, 4, h, w] fp16: moments of the VAE's posterior, unscaled
    std: Tensor  # [B, 4, h, w] fp16
    posterior_noise: Tensor  # [B, 4, h, w] fp32
    noise: Tensor  # [B, 4, h, w] fp32
    timesteps: Tensor  # [B] int64
    text: Text  # of the whole batch, see `Words.together`; keys and lengths [B] for layers that drop
    time_ids: Tensor  # [B, 6] int64; of refiners [B, 5] fp32
    weight: Tensor  # [B] fp32: factor on the loss
    mask: Tensor  # [B, 1, h, w] fp32: factor on the squared error of each latent cell
    perturbation: Tensor | None = None  # [B, 4, h, w] fp32: noise that the model sees and is not to find
    extra: Tensor | None = None  # [B, 5, h, w] fp32: mask and masked picture, for inpainting models
    prior: Tensor | None = None  # [P] int64: which samples are to stay what the base predicts; None: none

    @property
    def seen_noise(self) -> Tensor:
        """The noise in the model's input, [B, 4, h, w]."""
        return self.noise if self.perturbation is None else self.noise + self.perturbation

    def entering(self, noisy: Tensor) -> Tensor:
        """What the UNet takes, [B, 4 or 9, h, w]: the noisy latents, and what it sees beside them."""
        return noisy if self.extra is None else torch.cat([noisy, self.extra], dim=1)

    def to(self, device: torch.device, text: torch.dtype) -> "Batch":
        """The batch on a device, with the text's floating-point tensors in the UNet's type."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        cast = {"prompt_embeds", "pooled", "kept"}
        return replace(moved, text={name: t.to(text) if name in cast else t for name, t in moved.text.items()})

    def pinned(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Any) -> "Batch":
        plain = [f.name for f in fields(self) if f.name not in {"names", "text"}]
        text = {name: change(tensor) for name, tensor in self.text.items()}
        tensors = {name: getattr(self, name) for name in plain}
        changed: dict[str, Any] = {name: None if t is None else change(t) for name, t in tensors.items()}
        return replace(self, text=text, **changed)


@dataclass(frozen=True)
class Samples:
    """Everything that batches are made of. `dropped` is the text of a caption that is left out."""

    pictures: Sequence[Picture]
    choices: Sequence[Choice]  # of the pictures' captions
    keys: Keys
    latents: cache.Store
    words: Words
    dropped: Text
    seed: int
    objective: Objective
    clock: Clock
    scale: LatentScale
    holes: Inpainting | None = None  # how masks are drawn, for inpainting models
    refines: bool = False  # whether an aesthetic score stands in the place of the target size
    dropout: bool = False  # whether layers of the model drop, by keys that come with the text

    def picture(self, sample: int) -> Picture:
        """The picture of a sample of the plan."""
        return self.pictures[sample % len(self.pictures)]

    def choice(self, sample: int) -> Choice:
        """What the sample's text is drawn from."""
        return self.choices[sample % len(self.pictures)]

    def each(self, one: Callable[[int], T], chosen: Sequence[int]) -> list[T]:
        """What `one` makes of each sample. Rows that come from afar are waited for together."""
        if self.latents.beyond is None:
            return [one(sample) for sample in chosen]
        return [made for _, made in mapped(one, chosen, FAR, FAR)]

    def mask(self, picture: Picture, geometry: Geometry, shape: tuple[int, ...]) -> Tensor:
        """Factor on the loss of each latent cell, [1, h, w]."""
        if picture.mask is None:
            return torch.ones(1, *shape)
        return masks.factor(picture.data, self.latents.get(masks.key(picture, geometry)))

    def time_ids(self, picture: Picture, geometry: Geometry) -> Tensor:
        """The micro-conditioning of a picture: six integers, or for a refiner four and the score."""
        if self.refines:
            return torch.tensor([*geometry.time_ids()[:4], picture.data.aesthetic_score])
        return torch.tensor(geometry.time_ids())

    def hole(self, picture: Picture, geometry: Geometry, variant: int, draw: tuple[int, int, int]) -> Tensor:
        """What an inpainting model sees beside the noisy latents, [5, h, w]."""
        assert self.holes is not None
        row = self.latents.get(holes.key(self.keys, picture, geometry, variant, self.holes))
        return holes.beside(row, self.scale, draw)


def batch(
    samples: Samples, epoch: int, chosen: Sequence[tuple[int, bool]], drawn: dict[int, int] | None = None
) -> Batch:
    """The micro-batch of (sample, counts) pairs; a sample that does not count gets weight 0. `drawn`: the timesteps
    of the step's samples, where they depend on each other."""
    drawn = drawn or samples.clock.draw(samples.seed, 0, epoch, [sample for sample, _ in chosen])
    rows = samples.each(lambda sample: _row(samples, epoch, sample, drawn[sample]), [sample for sample, _ in chosen])
    columns = {name: torch.stack([row[name] for row, _ in rows]) for name in rows[0][0]}
    text = samples.words.together([words for _, words in rows])
    if samples.dropout:
        draws = [keyed.generator(samples.seed, "adapter", epoch, sample).integers(1 << 63) for sample, _ in chosen]
        text |= {"keys": torch.tensor(draws), "lengths": torch.tensor([samples.words.length(t) for _, t in rows])}
    weights = [samples.picture(s).data.weight * samples.clock.weight(drawn[s]) for s, _ in chosen]
    counts = [weight if counted else 0.0 for weight, (_, counted) in zip(weights, chosen, strict=True)]
    names = tuple(samples.picture(sample).name for sample, _ in chosen)
    kept = [row for row, (sample, _) in enumerate(chosen) if samples.picture(sample).data.prior_prediction]
    prior = torch.tensor(kept) if kept else None
    return Batch(names=names, weight=torch.tensor(counts), text=text, prior=prior, **columns)


def _row(samples: Samples, epoch: int, sample: int, timestep: int) -> tuple[dict[str, Tensor], Text]:
    """A sample's tensors and its text."""
    picture, seed = samples.picture(sample), samples.seed

    def draw(purpose: str) -> np.random.Generator:
        return keyed.generator(seed, purpose, epoch, sample)

    geometry = picture.geometries[draw("variant").integers(len(picture.geometries))]
    moments = samples.latents.get(samples.keys.latent(picture, geometry))
    shape = (moments.shape[0] // 2, *moments.shape[1:])
    mean, std = moments[: shape[0]], moments[shape[0] :]
    posterior = torch.from_numpy(noise.normal(seed, "posterior", epoch, sample, shape))
    key = (seed, epoch, sample)
    perturbation = noise.perturbation(key, shape, samples.objective)
    tensors = {
        "mean": mean,
        "std": std,
        "posterior_noise": posterior,
        "noise": noise.draw(key, lambda: samples.scale.sample(mean, std, posterior)[0], shape, samples.objective),
        **({} if perturbation is None else {"perturbation": perturbation}),
        "timesteps": torch.tensor(timestep),
        "time_ids": samples.time_ids(picture, geometry),
        "mask": samples.mask(picture, geometry, shape[1:]),
    }
    if samples.holes:
        variant = int(draw("which_hole").integers(samples.holes.masks_per_image))
        tensors["extra"] = samples.hole(picture, geometry, variant, key)
    return tensors, _text(samples, epoch, sample)


def caption(samples: Samples, epoch: int, sample: int) -> Prompt | None:
    """What a sample's text says in an epoch; None where it is left out, or where all of its tags are."""
    draws = (keyed.generator(samples.seed, purpose, epoch, sample).random() for purpose in ("caption", "wording"))
    if keyed.generator(samples.seed, "dropout", epoch, sample).random() < samples.picture(sample).data.caption_dropout:
        return None
    prompt = samples.choice(sample).pick(*draws)
    return prompt if any(prompt.texts) else None


def _text(samples: Samples, epoch: int, sample: int) -> Text:
    prompt, options = caption(samples, epoch, sample), samples.words.options
    text = samples.dropped if prompt is None else samples.words.of(prompt)
    for encoder, share in enumerate((options.drop_encoder_1, options.drop_encoder_2)):
        if share and keyed.generator(samples.seed, f"drop_encoder_{encoder + 1}", epoch, sample).random() < share:
            text = samples.words.without(text, encoder, samples.dropped)
    return text


def steps(
    samples: Samples,
    order: plan.Plan,
    first: int,
    last: int,
    micro_batch: int,
    rank: int,
    processes: int,
    workers: int,
    pin: bool,
) -> Iterator[tuple[int, int, list[Batch]]]:
    """(epoch, images of all processes, this process's micro-batches) of the steps first..last-1, read ahead."""

    def make(step: int) -> tuple[int, int, list[Batch]]:
        epoch, chosen = order.step(step)
        drawn = samples.clock.draw(samples.seed, step, epoch, chosen)
        parts = plan.share(order, chosen, micro_batch, rank, processes)
        batches = [batch(samples, epoch, part, drawn) for part in parts]
        return epoch, len(chosen), [b.pinned() for b in batches] if pin else batches

    if workers == 0:
        yield from (make(step) for step in range(first, last))
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(make, step) for step in range(first, min(first + AHEAD, last))]
        for step in range(first, last):
            ready = ahead.pop(0).result()
            if step + AHEAD < last:
                ahead.append(pool.submit(make, step + AHEAD))
            yield ready
