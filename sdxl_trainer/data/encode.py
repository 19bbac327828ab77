"""Filling the cache: pictures to moments of their latents, captions to embeddings. Also the keys of both."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdxl_trainer import cpus, vae
from sdxl_trainer.base import Base
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Cache, TextOptions
from sdxl_trainer.data import cache, images, resize, table
from sdxl_trainer.data.captions import Choice
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.memo import Memo
from sdxl_trainer.data.pictures import Picture, Pictures
from sdxl_trainer.data.problems import raise_all
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError

if TYPE_CHECKING:
    from sdxl_trainer.text import Cut

# Part of every embedding's key: raise it when captions would be encoded otherwise.
TEXT_VERSION = 2

# Pixels that are decoded ahead of what encodes them, over all processes that decode.
AHEAD_BYTES = 32 << 20
# Called with how many rows are done, how many there are to do, and what they are.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Keys:
    """What, besides a picture or caption, decides a row of the cache."""

    vae: str
    vae_precision: str
    text: str
    text_precision: str
    reading: TextOptions

    def described(self) -> list[Any]:
        """All of it, with the versions of what makes the rows."""
        reading = self.reading.model_dump(mode="json")
        pixels = [images.DECODER, *map(resize.made_by, resize.FILTERS)]
        return [self.vae, self.vae_precision, self.text, self.text_precision, reading, *pixels, TEXT_VERSION]

    def latent(self, picture: Picture, geometry: Geometry) -> str:
        return cache.key(
            "latent",
            images.DECODER,
            picture.content,
            geometry.to_json(),
            resize.made_by(picture.data.interpolation),
            self.vae,
            self.vae_precision,
        )

    def text_row(self, prompt: Prompt) -> str:
        """The text and the tokenizers' files stand for the token ids, so that a warm start needs no tokenizer."""
        options = self.reading
        chunks = 1 if options.long_captions == "cut" else options.max_chunks
        emphasis = options.emphasis if prompt.emphasis else "off"
        reading = [options.long_captions, chunks, options.clip_skip, emphasis]
        return cache.key("text", TEXT_VERSION, prompt.text, prompt.second, reading, self.text, self.text_precision)

    def texts(self, prompt: Prompt) -> tuple[str, str]:
        """The names of both of its rows: its sequence, its pooled output."""
        row = self.text_row(prompt)
        return f"{row}.states", f"{row}.pooled"


@dataclass(frozen=True)
class Decoded:
    """Pixels uint8 [h, w, 3] of a picture under one of its geometries."""

    picture: Picture
    geometry: Geometry
    pixels: np.ndarray


def keys(base: Base, options: Cache, reading: TextOptions, text_precision: str, memo: Memo) -> Keys:
    names = [p for p in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2") if p in base.parts]
    text = [base.hash(name, memo) for name in names]
    made = Keys(base.hash("vae", memo), options.vae_precision, cache.key(*text), text_precision, reading)
    memo.save()
    return made


class Work(Sequence[tuple[Picture, Geometry]]):
    """Pictures under geometries to be encoded: two numbers each, in the order of the pictures."""

    def __init__(self, pictures: Pictures, numbers: np.ndarray) -> None:
        self.pictures, self.numbers = pictures, numbers  # int64 [n, 2]: picture, geometry

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Work(self.pictures, self.numbers[index])
        picture = self.pictures[int(self.numbers[index, 0])]
        return picture, picture.geometries[self.numbers[index, 1]]

    def cells(self) -> int:
        """Latent cells of all pairs together."""
        sides = np.array(self.pictures.targets, dtype="<i8").reshape(-1, 2) // 8
        return int(sides[self.pictures.rows["target"][self.numbers[:, 0]]].prod(axis=1).sum())

    def by_picture(self) -> list["Work"]:
        """The same, in parts of one picture each."""
        return [self[a:b] for a, b in pairwise([*np.flatnonzero(self._first()).tolist(), len(self)])]

    def _first(self) -> np.ndarray:
        return np.concatenate([[True], self.numbers[1:, 0] != self.numbers[:-1, 0]]) if len(self) else np.zeros(0, bool)


def wanted(
    store: cache.Store, pictures: Pictures, names: Callable[[Picture, Geometry], Sequence[str]]
) -> tuple[int, Work]:
    """How many rows pictures need, and for what rows are missing. `names` gives those of a picture under a geometry;
    pairs whose first row is the same are one."""
    found, numbers = [np.zeros((0, 1, 2), "<i8")], [np.zeros((0, 2), "<i8")]
    for start in range(0, len(pictures), table.BATCH):
        part = [(i, pictures[i]) for i in range(start, min(start + table.BATCH, len(pictures)))]
        pairs = [(i, n, names(p, g)) for i, p in part for n, g in enumerate(p.geometries)]
        keys = table.keys(name for _, _, rows in pairs for name in rows)
        found.append(keys.reshape(len(pairs), -1, 2))
        numbers.append(np.array([(i, n) for i, n, _ in pairs], "<i8").reshape(-1, 2))
    whole = np.concatenate(found[1:] or found)
    first = table.distinct(whole[:, 0])
    rows = whole[first].reshape(-1, 2)
    missing = store.lacking(rows).reshape(len(first), -1).any(axis=1)
    return len(rows), Work(pictures, np.concatenate(numbers)[first[missing]])


class Prompts(Sequence[Prompt]):
    """Different prompts by number, made when they are asked for: a few bytes each in memory. `places` int32 [n, 2] say
    in which choice each stands and where in it, or at -1 where among `more`; `keys` int64 [n, 2] are those of its
    first row in the cache."""

    def __init__(self, more: Sequence[Prompt], choices: Sequence[Choice], places: np.ndarray, keys: np.ndarray) -> None:
        self.more, self.choices, self.places, self.keys = more, choices, places, keys

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Prompts(self.more, self.choices, self.places[index], self.keys[index])
        choice, number = self.places[index].tolist()
        return self.more[number] if choice < 0 else self.choices[choice].prompts()[number]

    def lacking(self, store: cache.Store) -> "Prompts":
        """Those that the store has no rows of."""
        lacks = store.lacking(self.keys)
        return Prompts(self.more, self.choices, self.places[lacks], self.keys[lacks])


def prompts(keys: Keys, more: Sequence[Prompt], choices: Sequence[Choice], numbers: np.ndarray) -> Prompts:
    """The different prompts among `more` and in the choices of these numbers, each where it comes first."""
    places, found = [np.zeros((0, 2), "<i4")], [np.zeros((0, 2), "<i8")]

    def note(spoken: Iterable[tuple[int, Sequence[Prompt]]]) -> None:
        each = [(choice, number, prompt) for choice, said in spoken for number, prompt in enumerate(said)]
        places.append(np.array([(choice, number) for choice, number, _ in each], "<i4").reshape(-1, 2))
        found.append(table.keys(keys.texts(prompt)[0] for *_, prompt in each))

    note([(-1, more)])
    for start in range(0, len(numbers), table.BATCH):
        note((number, choices[number].prompts()) for number in numbers[start : start + table.BATCH].tolist())
    rows = np.concatenate(found)
    first = table.distinct(rows)
    return Prompts(more, choices, np.concatenate(places)[first], rows[first])


def fill_latents(
    base: Base,
    options: Cache,
    store: cache.Store,
    keys: Keys,
    count: int,
    pictures: Iterator[Decoded | UserError],
    device: torch.device,
    progress: Progress,
) -> None:
    """Encode `count` pictures into the store, as they come from `decoded`. Every one that cannot be decoded is named,
    after the rest is done."""
    encoder = vae.load(base, DTYPES[options.vae_precision], device)
    writer, problems, done = cache.Writer(store), list[UserError](), 0
    waiting: dict[tuple[int, int], list[Decoded]] = {}
    try:
        for item in pictures:
            if isinstance(item, UserError):
                problems.append(item)
                continue
            batch = waiting.setdefault(item.geometry.target, [])
            batch.append(item)
            size = at_once(options.batch_size, item.geometry.target)
            if len(batch) == size:
                _encode_pictures(encoder, writer, keys, waiting.pop(item.geometry.target), size, device)
                done += size
                progress(done, count, "pictures")
        for target, batch in waiting.items():
            _encode_pictures(encoder, writer, keys, batch, at_once(options.batch_size, target), device)
        if done < count:
            progress(count, count, "pictures")
    finally:
        writer.flush()
    raise_all(problems)


def fill_texts(
    base: Base,
    options: Cache,
    store: cache.Store,
    keys: Keys,
    prompts: Sequence[Prompt],
    device: torch.device,
    progress: Progress,
) -> tuple[int, list["Cut"]]:
    """Encode prompts into the store, in the text encoders' type; gives how many are too long, and the first of them."""
    from sdxl_trainer import text

    encoders = text.load_to_encode(base, DTYPES[keys.text_precision], device)
    writer, count, first, size = cache.Writer(store), 0, list["Cut"](), options.text_batch_size
    for start in range(0, len(prompts), size):
        batch = list(prompts[start : start + size])
        tokens = text.tokenize(encoders.tokenizers, batch, keys.reading)
        cut = text.cuts(encoders.tokenizers, batch, tokens)
        count, first = count + len(cut), [*first, *cut][: text.SHOWN]
        for prompt, encoded in zip(batch, text.encode_tokens(encoders, tokens, keys.reading, size), strict=True):
            states, pooled = (tensor.cpu() for tensor in encoded)
            cache.finite([(f"the caption '{prompt.text[:40]}'", states), ("its pooled output", pooled)])
            for name, row in zip(keys.texts(prompt), (states, pooled), strict=True):
                writer.add(name, row)
        progress(start + len(batch), len(prompts), "captions")
    writer.flush()
    return count, first


def refuse_unshared(keys: Keys, texts: cache.Store, prompts: Prompts, latents: cache.Store, work: Work) -> None:
    """UserError if rows of these that other processes have encoded are not here: they have another cache folder."""
    here = [keys.latent(*work[at]) in latents for at in (0, -1)[: len(work)]]
    if len(prompts.lacking(texts)) or not all(here):
        fix = (
            "set cache.path to a folder that all machines share; or fill a mirror first: sdxl cache CONFIG.toml --push"
        )
        where = f"cache.path = '{latents.folder.parent}'"
        raise UserError("what other processes encoded is not in this one's cache folder", where, fix)


class _Decoder(torch.utils.data.Dataset[Any]):
    """Decodes in worker processes, each picture once: item -> pixels of all its geometries, or the error."""

    def __init__(self, work: Sequence[Work]) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> tuple[int, list[np.ndarray] | UserError]:
        picture, geometries = self.work[index][0][0], [geometry for _, geometry in self.work[index]]
        scaled: dict[tuple[int, int], np.ndarray] = {}
        try:
            image = images.decode(picture.record.read(), picture.name)
        except UserError as error:
            return index, error
        for geometry in geometries:
            if geometry.resized not in scaled:
                scaled[geometry.resized] = images.resized(image, geometry, picture.data.interpolation)
        return index, [images.cut(scaled[geometry.resized], geometry) for geometry in geometries]


def decoded(work: Work, options: Cache) -> Iterator[Decoded | UserError]:
    """Pixels of every (picture, geometry), each picture read once. The processes that decode begin at once, and work
    ahead of who asks by as many pictures as fit into `AHEAD_BYTES`, two each at least."""
    items = work.by_picture()
    workers = min(8, cpus.allowed()) if options.workers is None else options.workers
    workers = min(workers, len(items))
    largest = max(map(len, items), default=1) * max((3 * h * w for h, w in work.pictures.targets), default=1)
    ahead = min(max(2, AHEAD_BYTES // (workers * largest)), 64) if workers else None
    loader = torch.utils.data.DataLoader(
        _Decoder(items), batch_size=None, num_workers=workers, collate_fn=_unchanged, prefetch_factor=ahead
    )
    return _taken(items, iter(loader))


def _taken(items: Sequence[Work], results: Iterator[Any]) -> Iterator[Decoded | UserError]:
    for index, result in results:
        if isinstance(result, UserError):
            yield result
        else:
            yield from (Decoded(p, g, pixels) for (p, g), pixels in zip(items[index], result, strict=True))


@contextmanager
def explained() -> Iterator[None]:
    """Turn the end of a worker process, which PyTorch raises wherever this one is at work, into a message."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker .*?(killed by signal: \w+|exited unexpectedly)", str(error))
        if found is None:
            raise
        what = f"a process that decodes pictures ended ({found[1]}): the system may have run out of memory"
        fix = "set cache.workers lower, 0 for none; the same command goes on with what is not encoded yet"
        raise UserError(what, "cache.workers", fix) from error


def _unchanged(item: Any) -> Any:
    return item


def at_once(batch_size: int, target: tuple[int, int]) -> int:
    """Pictures [height, width] of a forward pass of the VAE: those with the pixels of `batch_size` of 512 x 512."""
    return min(batch_size, max(1, batch_size * 512**2 // (target[0] * target[1])))


@torch.no_grad()
def _encode_pictures(
    encoder: Any, writer: cache.Writer, keys: Keys, batch: list[Decoded], size: int, device: torch.device
) -> None:
    """Rows of a batch of pictures into the store.

    Always of `size` pictures, repeated if there are fewer: libraries choose their kernels by the shape, and a row must
    not depend on what was encoded beside it (a cache that was filled in parts is the same cache).
    """
    pixels = [item.pixels for item in batch]
    filled = np.stack(pixels + pixels[-1:] * (size - len(batch)))
    rows = moments(encoder, scaled(filled, device, encoder.dtype))[: len(batch)]
    cache.finite((item.picture.name, row) for item, row in zip(batch, rows, strict=True))
    for item, row in zip(batch, rows, strict=True):
        writer.add(keys.latent(item.picture, item.geometry), row, item.geometry.to_json())


def scaled(pixels: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pictures uint8 [B, H, W, 3] as the VAE takes them: [B, 3, H, W] in -1..1."""
    return (torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(dtype)


def moments(encoder: Any, pixels: Tensor) -> Tensor:
    """Rows [B, 8, h, w] fp16 on the CPU: mean and standard deviation of the latents, unscaled (law 3)."""
    posterior = encoder.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).half().cpu()
