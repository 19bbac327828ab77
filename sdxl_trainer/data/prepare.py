"""Everything before the first step: read the data sets, fill the cache, hand out what batches are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdxl_trainer import model, parameters, text, timesteps, tokens
from sdxl_trainer.base import Base
from sdxl_trainer.config import Config
from sdxl_trainer.data import cache, encode, masks, plan
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.data.pictures import Memo, Picture, load, open_memo, raise_all
from sdxl_trainer.errors import UserError, shortened

EMPTY = ""


@dataclass(frozen=True)
class Stock:
    """The data of a run beside what the cache holds of it."""

    pictures: list[Picture]  # what is trained
    held_out: list[Picture]
    captions: list[str]  # distinct, with validation prompts and the empty one
    text_learns: bool  # then captions are encoded in the step and not cached
    keys: encode.Keys
    latents: cache.Store
    texts: cache.Store
    memo: Memo
    measured: bool = False  # whether the loss on held-out pictures is wanted

    @property
    def cached(self) -> list[Picture]:
        """The pictures whose latents and masks are needed."""
        return self.pictures + (self.held_out if self.measured else [])

    def missing_latents(self) -> list:
        return encode.missing_latents(self.latents, self.keys, self.cached)

    def missing_masks(self) -> list:
        return masks.missing(self.latents, self.cached)

    def missing_texts(self) -> list[str]:
        return [] if self.text_learns else encode.missing_texts(self.texts, self.keys, self.captions)


def cache_folder(config: Config) -> Path:
    return Path(config.cache.path or Path(config.output_dir) / "cache").expanduser()


def take_stock(config: Config, base: Base, text_precision: str) -> Stock:
    """Read data sets, sizes and hashes; look up what is cached. Encodes nothing."""
    folder = cache_folder(config)
    memo = open_memo(folder)
    found = load(config, memo)
    pictures = [picture for picture in found if not picture.held_out]
    held_out = [replace(p, geometries=p.geometries[:1]) for p in found if p.held_out]
    measured = config.validation.loss_every is not None and bool(held_out)
    _refuse_empty(config, pictures)
    prompts = [*config.validation.prompts, *([config.validation.negative] if config.validation.negative else [])]
    captions = list(dict.fromkeys([EMPTY, *prompts, *(c for p in pictures + held_out * measured for c in p.captions)]))
    tokens.refuse_unread(config.token, [caption for picture in pictures for caption in picture.captions])
    keys = encode.keys(base, config.cache, text_precision, memo)
    latents, texts = cache.open_store(folder / "latents"), cache.open_store(folder / "texts")
    learns = parameters.text_learns(config, text.parameter_names(base))
    return Stock(pictures, held_out, captions, learns, keys, latents, texts, memo, measured)


def _refuse_empty(config: Config, pictures: Sequence[Picture]) -> None:
    for index, data in enumerate(config.data):
        if not any(picture.data is data for picture in pictures):
            what = f"held_out = {data.held_out:g} leaves no picture to train on"
            raise UserError(what, f"data.{index}.path = '{data.path}'", "hold out less, or add pictures")


def order(config: Config, stock: Stock) -> plan.Plan:
    """Which pictures each step trains on."""
    targets = [picture.geometries[0].target for picture in stock.pictures]
    members = [[i for i, p in enumerate(stock.pictures) if p.data is data] for data in config.data]
    entries = [sum(stock.pictures[i].record.repeats for i in m) for m in members]
    trained = [n for n, data in zip(entries, config.data, strict=True) if not data.regularisation]
    weights = sum(data.sampling_weight or 0.0 for data in config.data)
    counts = {}
    for number, data in enumerate(config.data):
        if not data.regularisation:
            share = (
                data.sampling_weight / weights * sum(trained)
                if data.sampling_weight
                else entries[number] * data.repeats
            )
            counts[number] = max(1, round(share))
    learned, others = sum(counts.values()), sum(entries) - sum(trained)
    streams = [
        plan.Stream(
            tuple(m),
            tuple(stock.pictures[i].record.repeats for i in m),
            counts.get(number) or max(1, round(learned * entries[number] / others)),
        )
        for number, m in enumerate(members)
    ]
    return plan.make(config.seed, config.train.batch_size, targets, streams)


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
    # All lists come first: rows that other processes have already written must not shift the shares.
    captions: Sequence[str] = stock.missing_texts()[rank::processes]
    mine, latents = stock.missing_masks()[rank::processes], stock.missing_latents()[rank::processes]
    raise_all(masks.fill(stock.latents, mine, progress))
    if captions:
        cut = encode.fill_texts(base, config.cache, stock.texts, stock.keys, captions, device, progress)
        _say_cut(cut, say)
    if stock.text_learns:
        expanded = [tokens.expand(config.token, caption) for caption in stock.captions]
        _say_cut(text.cut(tokens.tokenizers(base, config.token), expanded), say)
    if latents:
        encode.fill_latents(base, config.cache, stock.latents, stock.keys, latents, device, progress)
    wait()
    stock.texts.refresh()
    stock.latents.refresh()


def _say_cut(captions: Sequence[str], say: Callable[[str], None]) -> None:
    if captions:
        say(f"{len(captions)} captions are cut at 77 tokens: {shortened((repr(c[:40]) for c in captions), 3)}")


def samples(config: Config, base: Base, stock: Stock, count: int) -> Samples:
    """What batches are made of, for a schedule of that many timesteps."""
    ids = None
    if stock.text_learns:
        expanded = [tokens.expand(config.token, caption) for caption in stock.captions]
        rows = text.token_ids(tokens.tokenizers(base, config.token), expanded).int()
        ids = dict(zip(stock.captions, rows, strict=True))
    made = Samples(
        stock.pictures,
        stock.keys,
        stock.latents,
        stock.texts,
        ids,
        {},
        config.seed,
        config.objective,
        timesteps.clock(config.timesteps, count, config.train.batch_size),
        model.latent_scale(base.config("vae")),
        dropout=bool(config.adapter and config.adapter.dropout),
    )
    return replace(made, dropped=dropped_caption(config, base, made))


def held_out_samples(config: Config, base: Base, stock: Stock, timesteps: int) -> Samples:
    """The held-out pictures as samples: each in its first geometry, its caption never left out."""
    plain = {"caption_dropout": 0.0, "weight": 1.0}
    pictures = [replace(p, data=p.data.model_copy(update=plain)) for p in stock.held_out]
    return samples(config, base, replace(stock, pictures=pictures), timesteps)


def dropped_caption(config: Config, base: Base, samples: Samples) -> dict[str, Tensor]:
    """What stands for a caption that is left out. The pipeline's own is zeros where the model says so
    (`force_zeros_for_empty_prompt`, true for SDXL base), else the embedding of the empty caption."""
    empty = samples.text(EMPTY)
    choice = config.text.dropped_caption
    if choice == "zeros" or (choice == "pipeline" and base.zeros_for_empty()):
        return {name: value if name == "tokens" else torch.zeros_like(value) for name, value in empty.items()}
    return empty
