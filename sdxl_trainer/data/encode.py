"""Filling the cache: pictures to moments of their latents, captions to embeddings. Also the keys of both."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.config import Cache
from sdxl_trainer.data import cache
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.pictures import Memo, Picture, raise_all
from sdxl_trainer.errors import UserError

# Part of every latent's key: raise it when decoding, resizing or cropping would give other pixels.
DECODER_VERSION = 1
# Part of every embedding's key: raise it when captions would be encoded otherwise.
TEXT_VERSION = 1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Called with how many rows are done, how many there are to do, and what they are.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Keys:
    """What, besides a picture or caption, decides a row of the cache."""

    vae: str
    vae_precision: str
    text: str
    text_precision: str

    def latent(self, picture: Picture, geometry: Geometry) -> str:
        return cache.key(
            "latent",
            DECODER_VERSION,
            picture.content,
            geometry.to_json(),
            picture.data.interpolation,
            self.vae,
            self.vae_precision,
        )

    def text_row(self, caption: str) -> str:
        """The caption and the tokenizers' files stand for the token ids, so that a warm start needs no tokenizer."""
        return cache.key("text", TEXT_VERSION, caption, self.text, self.text_precision)


def keys(base: Base, options: Cache, text_precision: str, memo: Memo) -> Keys:
    text = [base.hash(p, memo) for p in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")]
    made = Keys(base.hash("vae", memo), options.vae_precision, cache.key(*text), text_precision)
    memo.save()
    return made


def missing_latents(store: cache.Store, keys: Keys, pictures: Sequence[Picture]) -> list[tuple[Picture, Geometry]]:
    """What must be encoded, each key once."""
    wanted = {keys.latent(p, g): (p, g) for p in pictures for g in p.geometries}
    return [work for row, work in wanted.items() if row not in store]


def fill_latents(
    base: Base,
    options: Cache,
    store: cache.Store,
    keys: Keys,
    work: Sequence[tuple[Picture, Geometry]],
    device: torch.device,
    progress: Progress,
) -> None:
    """Encode pictures into the store. Every picture that cannot be decoded is named, after the rest is done."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        base.vae, variant=weights_file(base, "vae"), torch_dtype=DTYPES[options.vae_precision], use_safetensors=True
    )
    vae = vae.to(device).eval().requires_grad_(False)
    writer, problems, done = cache.Writer(store), list[UserError](), 0
    for group in _by_size(work).values():
        for batch in _decoded(group, options):
            problems += [result for _, result in batch if isinstance(result, UserError)]
            good = [(item, pixels) for item, pixels in batch if not isinstance(pixels, UserError)]
            if good:
                _encode_pictures(vae, writer, keys, good, device)
            done += len(batch)
            progress(done, len(work), "pictures")
    writer.flush()
    raise_all(problems)


def missing_texts(store: cache.Store, keys: Keys, captions: Sequence[str]) -> list[str]:
    return [c for c in dict.fromkeys(captions) if f"{keys.text_row(c)}.states" not in store]


def fill_texts(
    base: Base,
    options: Cache,
    store: cache.Store,
    keys: Keys,
    captions: Sequence[str],
    device: torch.device,
    progress: Progress,
) -> list[str]:
    """Encode captions into the store, in the text encoders' type; gives those that are cut at 77 tokens."""
    from sdxl_trainer import text

    encoders = text.load(base, DTYPES[keys.text_precision], device)
    writer = cache.Writer(store)
    for start in range(0, len(captions), options.text_batch_size):
        batch = captions[start : start + options.text_batch_size]
        states, pooled = (tensor.cpu() for tensor in text.encode(encoders, batch))
        for index, caption in enumerate(batch):
            cache.finite([(f"the caption '{caption[:40]}'", states[index]), ("its pooled output", pooled[index])])
            writer.add(f"{keys.text_row(caption)}.states", states[index])
            writer.add(f"{keys.text_row(caption)}.pooled", pooled[index])
        progress(start + len(batch), len(captions), "captions")
    writer.flush()
    return [c for c, over in zip(captions, text.overflows(encoders.tokenizers[0], captions), strict=True) if over]


def _by_size(work: Sequence[tuple[Picture, Geometry]]) -> dict[tuple[int, int], list[tuple[Picture, Geometry]]]:
    groups: dict[tuple[int, int], list[tuple[Picture, Geometry]]] = {}
    for picture, geometry in work:
        groups.setdefault(geometry.target, []).append((picture, geometry))
    return groups


class _Decoder(torch.utils.data.Dataset[Any]):
    """Decodes in worker processes: item -> ((picture, geometry), uint8 pixels [h, w, 3] or the error)."""

    def __init__(self, work: Sequence[tuple[Picture, Geometry]]) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | UserError]:
        from sdxl_trainer.data import images

        picture, geometry = self.work[index]
        try:
            image = images.decode(picture.record.read(), picture.name)
            return index, images.pixels(image, geometry, picture.data.interpolation)
        except UserError as error:
            return index, error


def _decoded(
    work: Sequence[tuple[Picture, Geometry]], options: Cache
) -> Iterator[list[tuple[tuple[Picture, Geometry], np.ndarray | UserError]]]:
    workers = min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    loader = torch.utils.data.DataLoader(
        _Decoder(work), batch_size=options.batch_size, num_workers=min(workers, len(work)), collate_fn=list
    )
    for batch in loader:
        yield [(work[index], pixels) for index, pixels in batch]


@torch.no_grad()
def _encode_pictures(
    vae: Any,
    writer: cache.Writer,
    keys: Keys,
    batch: list[tuple[tuple[Picture, Geometry], np.ndarray]],
    device: torch.device,
) -> None:
    """Rows [8, h, w] fp16: mean and standard deviation of the latents, unscaled (law 3)."""
    stacked = torch.from_numpy(np.stack([pixels for _, pixels in batch])).to(device)
    scaled = (stacked.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(vae.dtype)
    posterior = vae.encode(scaled).latent_dist
    rows: Tensor = torch.cat([posterior.mean, posterior.std], dim=1).half().cpu()
    cache.finite((picture.name, row) for ((picture, _), _), row in zip(batch, rows, strict=True))
    for ((picture, geometry), _), row in zip(batch, rows, strict=True):
        writer.add(keys.latent(picture, geometry), row, geometry.to_json())
