"""From cached rows to the batches of a step. Every random choice about a sample is made here, by law 1."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

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
from sdxl_trainer.data.places import Places
from sdxl_trainer.data.words import Text, Words
from sdxl_trainer.model import Dropout, LatentScale
from sdxl_trainer.timesteps import Clock

# Steps prepared ahead of the one that trains.
AHEAD = 2
# A picture, and how it is shown.
Seen = tuple[Picture, Geometry]
# The numbers of both.
Shown = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples with latents of size h x w. All random numbers are already drawn."""

    names: tuple[str, ...]
    moments: Tensor  # [B, 8, h, w] fp16: mean and standard deviation of the VAE's posterior, unscaled
    posterior_noise: Tensor  # [B, 4, h, w] fp32
    noise: Tensor  # [B, 4, h, w] fp32
    timesteps: Tensor  # [B] int64
    text: Text  # of the whole batch, see `Words.together`
    time_ids: Tensor  # [B, 6] int64; of refiners [B, 5] fp32
    weight: Tensor  # [B] fp32: factor on the loss
    mask: Tensor | None = None  # [B, 1, h, w] fp32: factor on the squared error of each latent cell; None: 1 everywhere
    perturbation: Tensor | None = None  # [B, 4, h, w] fp32: noise that the model sees and is not to find
    extra: Tensor | None = None  # [B, 5, h, w] fp32: mask and masked picture, for inpainting models
    prior: Tensor | None = None  # [P] int64: which samples are to stay what the base predicts; None: none
    dropout: Dropout | None = None  # where layers of the model drop

    @property
    def mean(self) -> Tensor:
        """[B, 4, h, w]"""
        return self.moments.chunk(2, dim=1)[0]

    @property
    def std(self) -> Tensor:
        """[B, 4, h, w]"""
        return self.moments.chunk(2, dim=1)[1]

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
        plain = [f.name for f in fields(self) if f.name not in {"names", "text", "dropout"}]
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
    dropout: bool = False  # whether layers of the model drop

    @cached_property
    def places(self) -> Places[Shown]:
        """Where the latents lie of a picture under a geometry."""

        def names(shown: Shown) -> list[str]:
            picture = self.pictures[shown[0]]
            return [self.keys.latent(picture, picture.geometries[shown[1]])]

        return Places(self.latents, names)

    def picture(self, sample: int) -> Picture:
        """The picture of a sample of the plan."""
        return self.pictures[sample % len(self.pictures)]

    def choice(self, sample: int) -> Choice:
        """What the sample's text is drawn from."""
        return self.choices[sample % len(self.pictures)]

    def mask(self, seen: Sequence[Seen], shape: tuple[int, ...]) -> Tensor | None:
        """Factor on the loss of each latent cell, [B, 1, h, w]; None where no picture has a mask."""
        masked = {n: one for n, one in enumerate(seen) if one[0].mask is not None}
        if not masked:
            return None
        whole = torch.ones(len(seen), 1, *shape)
        rows = self.latents.stacked([masks.key(*one) for one in masked.values()])
        for number, row in zip(masked, rows, strict=True):
            whole[number] = masks.factor(masked[number][0].data, row)
        return whole

    def time_ids(self, seen: Sequence[Seen]) -> Tensor:
        """The micro-conditioning: six integers each, or for a refiner four and the score."""
        if self.refines:
            return _tensor([[*geometry.time_ids()[:4], p.data.aesthetic_score] for p, geometry in seen], np.float32)
        return _tensor([geometry.time_ids() for _, geometry in seen], np.int64)

    def beside(self, seen: Sequence[Seen], variants: Sequence[int], keys: Sequence[noise.Key]) -> Tensor:
        """What an inpainting model sees beside the noisy latents, [B, 5, h, w], with masks of those numbers."""
        options = self.holes
        assert options is not None
        names = [holes.key(self.keys, *one, number, options) for one, number in zip(seen, variants, strict=True)]
        rows = zip(self.latents.stacked(names), keys, strict=True)
        return torch.stack([holes.beside(row, self.scale, key) for row, key in rows])


def batch(
    samples: Samples, epoch: int, chosen: Sequence[tuple[int, bool]], drawn: dict[int, int] | None = None
) -> Batch:
    """The micro-batch of (sample, counts) pairs; a sample that does not count gets weight 0. `drawn`: the timesteps
    of the step's samples, where they depend on each other."""
    drawn = drawn or samples.clock.draw(samples.seed, 0, epoch, [sample for sample, _ in chosen])
    own = [sample for sample, _ in chosen]
    keys = [(samples.seed, epoch, sample) for sample in own]
    shown = [_shown(samples, epoch, sample) for sample in own]
    seen = [(picture := samples.pictures[number], picture.geometries[variant]) for number, variant in shown]
    moments = cache.stacked([place for (place,) in samples.places.of(shown)])
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    posterior = noise.normals("posterior", keys, shape)

    def latents(row: int) -> Tensor:
        mean, std = moments[row].chunk(2)
        return samples.scale.sample(mean, std, posterior[row])[0]

    texts = [_text(samples, epoch, sample) for sample in own]
    text = samples.words.together(texts)
    weights = [
        picture.data.weight * samples.clock.weight(drawn[sample]) if counts else 0.0
        for (picture, _), (sample, counts) in zip(seen, chosen, strict=True)
    ]
    kept = [row for row, (picture, _) in enumerate(seen) if picture.data.prior_prediction]
    return Batch(
        names=tuple(picture.name for picture, _ in seen),
        moments=moments,
        posterior_noise=posterior,
        noise=noise.draw(keys, latents, shape, samples.objective),
        timesteps=_tensor([drawn[sample] for sample in own], np.int64),
        text=text,
        time_ids=samples.time_ids(seen),
        weight=_tensor(weights, np.float32),
        mask=samples.mask(seen, shape[1:]),
        perturbation=noise.perturbation(keys, shape, samples.objective),
        extra=_extra(samples, keys, seen) if samples.holes else None,
        prior=torch.tensor(kept) if kept else None,
        dropout=_dropout(samples, keys, texts, text) if samples.dropout else None,
    )


def _tensor(numbers: Sequence[Any], dtype: type) -> Tensor:
    """`torch.tensor` of a list takes three times as long."""
    return torch.from_numpy(np.array(numbers, dtype))


def _dropout(samples: Samples, keys: Sequence[noise.Key], texts: Sequence[Prompt | Text], together: Text) -> Dropout:
    own = [int(keyed.generator(key[0], "adapter", *key[1:]).integers(1 << 63)) for key in keys]
    lengths = tuple(samples.words.length(text) for text in texts)
    if "chunks" not in together:
        return Dropout(tuple(own), lengths)
    chunks = _chunk_keys(own, together["chunks"].tolist(), len(together["tokens"]))
    return Dropout(tuple(own), lengths, tuple(chunks))


def _chunk_keys(keys: list[int], chunks: list[list[int]], count: int) -> list[int]:
    """A key for each of `count` chunks: its sample's for the first one, others derived from it."""
    found = [0] * count
    for key, row in zip(keys, chunks, strict=True):
        for number, chunk in enumerate(dict.fromkeys(row)):
            found[chunk] = (key + number * 0xD1342543DE82EF95) & ((1 << 63) - 1)
    return found


def _shown(samples: Samples, epoch: int, sample: int) -> Shown:
    """A sample's picture, and which of its geometries an epoch shows."""
    number, count = sample % len(samples.pictures), len(samples.picture(sample).geometries)
    drawn = int(keyed.generator(samples.seed, "variant", epoch, sample).integers(count)) if count > 1 else 0
    return number, drawn


def _extra(samples: Samples, keys: Sequence[noise.Key], seen: Sequence[Seen]) -> Tensor:
    """What an inpainting model sees beside the noisy latents, [B, 5, h, w]."""
    assert samples.holes is not None
    count = samples.holes.masks_per_image
    variants = [int(keyed.generator(key[0], "which_hole", *key[1:]).integers(count)) for key in keys]
    return samples.beside(seen, variants, keys)


def caption(samples: Samples, epoch: int, sample: int) -> Prompt | None:
    """What a sample's text says in an epoch; None where it is left out, or where all of its tags are."""

    def draw(purpose: str) -> float:
        return keyed.generator(samples.seed, purpose, epoch, sample).random()

    share, choice = samples.picture(sample).data.caption_dropout, samples.choice(sample)
    if share and draw("dropout") < share:
        return None
    # What has one way to end needs no number.
    prompt = choice.only or choice.pick(draw("caption"), draw("wording"))
    return prompt if any(prompt.texts) else None


def _text(samples: Samples, epoch: int, sample: int) -> Prompt | Text:
    prompt, options = caption(samples, epoch, sample), samples.words.options
    text = samples.dropped if prompt is None else prompt
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
