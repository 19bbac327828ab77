"""Everything before the first step: read the data sets, fill the cache, hand out what batches are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdxl_trainer import noise, parameters, text
from sdxl_trainer.base import Base
from sdxl_trainer.config import Config
from sdxl_trainer.data import cache, encode
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.data.pictures import Memo, Picture, load, open_memo
from sdxl_trainer.errors import shortened

EMPTY = ""


@dataclass(frozen=True)
class Stock:
    """The data of a run beside what the cache holds of it."""

    pictures: list[Picture]
    captions: list[str]  # distinct, with validation prompts and the empty one
    text_learns: bool  # then captions are encoded in the step and not cached
    keys: encode.Keys
    latents: cache.Store
    texts: cache.Store
    memo: Memo

    def missing_latents(self) -> list:
        return encode.missing_latents(self.latents, self.keys, self.pictures)

    def missing_texts(self) -> list[str]:
        return [] if self.text_learns else encode.missing_texts(self.texts, self.keys, self.captions)


def cache_folder(config: Config) -> Path:
    return Path(config.cache.path or Path(config.output_dir) / "cache").expanduser()


def take_stock(config: Config, base: Base, text_precision: str) -> Stock:
    """Read data sets, sizes and hashes; look up what is cached. Encodes nothing."""
    folder = cache_folder(config)
    memo = open_memo(folder)
    pictures = load(config, memo)
    prompts = [*config.validation.prompts, *([config.validation.negative] if config.validation.negative else [])]
    captions = list(dict.fromkeys([EMPTY, *prompts, *(c for p in pictures for c in p.captions)]))
    keys = encode.keys(base, config.cache, text_precision, memo)
    latents, texts = cache.open_store(folder / "latents"), cache.open_store(folder / "texts")
    learns = parameters.text_learns(config, text.parameter_names(base))
    return Stock(pictures, captions, learns, keys, latents, texts, memo)


def fill(
    config: Config,
    base: Base,
    stock: Stock,
    device: torch.device,
    progress: encode.Progress,
    say: Callable[[str], None],
    rank: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Encode what is missing; several processes share the work and meet in `wait`."""
    captions: Sequence[str] = stock.missing_texts()[rank::processes]
    if captions:
        cut = encode.fill_texts(base, config.cache, stock.texts, stock.keys, captions, device, progress)
        _say_cut(cut, say)
    if stock.text_learns:
        _say_cut(text.cut(text.tokenizers(base), stock.captions), say)
    latents = stock.missing_latents()[rank::processes]
    if latents:
        encode.fill_latents(base, config.cache, stock.latents, stock.keys, latents, device, progress)
    wait()
    stock.texts.refresh()
    stock.latents.refresh()


def _say_cut(captions: Sequence[str], say: Callable[[str], None]) -> None:
    if captions:
        say(f"{len(captions)} captions are cut at 77 tokens: {shortened((repr(c[:40]) for c in captions), 3)}")


def samples(config: Config, base: Base, stock: Stock, timesteps: int) -> Samples:
    """What batches are made of, for a schedule of that many timesteps."""
    tokens = None
    if stock.text_learns:
        ids = text.token_ids(text.tokenizers(base), stock.captions).int()
        tokens = dict(zip(stock.captions, ids, strict=True))
    made = Samples(
        stock.pictures,
        stock.keys,
        stock.latents,
        stock.texts,
        tokens,
        {},
        config.seed,
        config.objective.noise_offset,
        noise.cumulative(config.timesteps, timesteps),
        dropout=bool(config.adapter and config.adapter.dropout),
    )
    return replace(made, dropped=dropped_caption(config, base, made))


def dropped_caption(config: Config, base: Base, samples: Samples) -> dict[str, Tensor]:
    """What stands for a caption that is left out. The pipeline's own is zeros where the model says so
    (`force_zeros_for_empty_prompt`, true for SDXL base), else the embedding of the empty caption."""
    empty = samples.text(EMPTY)
    choice = config.text.dropped_caption
    if choice == "zeros" or (choice == "pipeline" and base.zeros_for_empty()):
        return {name: value if name == "tokens" else torch.zeros_like(value) for name, value in empty.items()}
    return empty
