"""Everything before the first step: read the data sets, fill the cache, hand out what batches are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import model, parameters, text, timesteps, tokens
from sdxl_trainer.base import Base
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Config, Inpainting, TextOptions
from sdxl_trainer.data import cache, captions, encode, holes, masks, plan
from sdxl_trainer.data.captions import Choice
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.data.pictures import Memo, Picture, load, open_memo
from sdxl_trainer.data.problems import Notes, raise_all
from sdxl_trainer.data.records import Record
from sdxl_trainer.data.words import Words
from sdxl_trainer.errors import UserError, shortened

EMPTY = Prompt("")


@dataclass(frozen=True)
class Stock:
    """The data of a run beside what the cache holds of it."""

    pictures: list[Picture]  # what is trained
    held_out: list[Picture]
    choices: list[Choice]  # what the text of each trained picture is drawn from
    prompts: list[Prompt]  # distinct, with validation prompts and the empty one
    text_learns: bool
    text_cached: bool  # else captions are encoded in the step
    keys: encode.Keys
    latents: cache.Store
    texts: cache.Store
    memo: Memo
    measured: bool = False  # whether the loss on held-out pictures is wanted
    holes: Inpainting | None = None  # how masks are drawn, for inpainting models
    trained_part: tuple[Picture, ...] = ()  # of the trained pictures those whose loss is wanted too

    @property
    def cached(self) -> list[Picture]:
        """The pictures whose latents and masks are needed."""
        return self.pictures + (self.held_out if self.measured else [])

    def missing_latents(self) -> list:
        return encode.missing_latents(self.latents, self.keys, self.cached)

    def missing_holes(self) -> list:
        return holes.missing(self.latents, self.keys, self.cached, self.holes) if self.holes else []

    def missing_masks(self) -> list:
        return masks.missing(self.latents, self.cached)

    def missing_texts(self) -> list[Prompt]:
        return encode.missing_texts(self.texts, self.keys, self.prompts) if self.text_cached else []


def cache_folder(config: Config) -> Path:
    return Path(config.cache.path or Path(config.output_dir) / "cache").expanduser()


def take_stock(config: Config, base: Base, text_precision: str, notes: Notes | None = None) -> Stock:
    """Read data sets, sizes and hashes; look up what is cached. Encodes nothing. With `notes` pictures that cannot be
    used are noted and left out, as long as there are others."""
    folder = cache_folder(config)
    memo = open_memo(folder)
    found = load(config, memo, notes)
    if notes is not None and len({id(picture.data) for picture in found}) < len(config.data):
        load(config, memo)  # nothing is left of a data set: the error that says why
    pictures = [picture for picture in found if not picture.held_out]
    held_out = [replace(p, geometries=p.geometries[:1]) for p in found if p.held_out]
    measured = config.validation.loss_every is not None and bool(held_out)
    part = _trained_part(config, pictures)
    _refuse_empty(config, pictures)
    text.refuse_clip_skip(base, config.text)
    choices = captions.choices(config.data, _records(config, pictures))
    unseen = captions.plain(config.data, _records(config, [*(held_out if measured else []), *part]))
    trained = [prompt for choice in choices for prompt in choice.prompts()]
    _refuse_new_words(config, pictures, choices)
    tokens.refuse_unread(config.token, [words for prompt in trained for words in prompt.texts])
    wanted = [config.validation.negative or "", *config.validation.prompts]
    drawn = [*(written(config.text, prompt) for prompt in wanted), *(p for choice in unseen for p in choice.prompts())]
    prompts = list(dict.fromkeys([EMPTY, *drawn, *trained]))
    keys = encode.keys(base, config.cache, config.text, text_precision, memo)
    latents, texts = cache.open_store(folder / "latents"), cache.open_store(folder / "texts")
    learns = parameters.text_learns(config, text.parameter_names(base))
    cached = config.text.cache and not learns
    if learns and not config.text.cache:
        what = "text.cache = false has no effect: text encoders that learn encode every caption in the step"
        raise UserError(what, "text.cache", "remove it")
    stock = Stock(pictures, held_out, choices, prompts, learns, cached, keys, latents, texts, memo, measured)
    return replace(stock, trained_part=part, holes=config.inpainting if base.inpaints else None)


def _trained_part(config: Config, pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """Trained pictures to measure, chosen by their bytes alone, each in its first geometry."""
    if config.validation.loss_every is None:
        return ()
    learned = {cache.key("trained part", p.content): p for p in pictures if not p.data.regularisation}
    chosen = sorted(learned)[: config.validation.trained_pictures]
    return tuple(replace(learned[name], geometries=learned[name].geometries[:1]) for name in chosen)


def _records(config: Config, pictures: Sequence[Picture]) -> list[tuple[int, Record]]:
    """Each picture's record with the number of its data set."""
    numbers = {id(data): number for number, data in enumerate(config.data)}
    return [(numbers[id(picture.data)], picture.record) for picture in pictures]


def written(options: TextOptions, prompt: str) -> Prompt:
    """A validation prompt, its emphasis read if any is."""
    return Prompt(prompt, emphasis=options.emphasis != "off")


def _refuse_empty(config: Config, pictures: Sequence[Picture]) -> None:
    for index, data in enumerate(config.data):
        if not any(picture.data is data for picture in pictures):
            what = f"held_out = {data.held_out:g} leaves no picture to train on"
            raise UserError(what, f"data.{index}.path = '{data.path}'", "hold out less, or add pictures")


def _refuse_new_words(config: Config, pictures: Sequence[Picture], choices: Sequence[Choice]) -> None:
    """The base cannot say what a caption with words means that it does not know."""
    for picture, choice in zip(pictures, choices, strict=True):
        words = [text for prompt in choice.prompts() for text in prompt.texts] if picture.data.prior_prediction else []
        for token in config.token:
            if any(token.name in text for text in words):
                what = f"the caption of {picture.name} holds the new word '{token.name}', which the base does not know"
                where = f"data.{config.data.index(picture.data)}.prior_prediction"
                raise UserError(what, where, "give these pictures captions of the class: caption, caption_only = true")


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
            config.data[number].regularisation,
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
    prompts: Sequence[Prompt] = stock.missing_texts()[rank::processes]
    mine, latents = stock.missing_masks()[rank::processes], stock.missing_latents()[rank::processes]
    hidden = stock.missing_holes()[rank::processes]
    raise_all(masks.fill(stock.latents, mine, progress))
    if prompts:
        cut = encode.fill_texts(base, config.cache, stock.texts, stock.keys, prompts, device, progress)
        _say_cut(cut, config.text, say)
    if not stock.text_cached:
        tokenizers, chunks = read(config, base, stock)
        _say_cut(text.cuts(tokenizers, stock.prompts, chunks), config.text, say)
    if latents:
        encode.fill_latents(base, config.cache, stock.latents, stock.keys, latents, device, progress)
    if hidden and stock.holes:
        holes.fill(base, config.cache, stock.latents, stock.keys, hidden, stock.holes, device, progress)
    wait()
    stock.texts.refresh()
    stock.latents.refresh()


def _say_cut(cut: Sequence[text.Cut], options: TextOptions, say: Callable[[str], None]) -> None:
    if cut:
        some = shortened((f"'{c.prompt.text[:40]}' loses {c.tokens}" for c in cut), 3)
        say(f"{len(cut)} captions have more than {text.longest(options)} tokens, the rest is cut off: {some}")


def read(config: Config, base: Base, stock: Stock) -> tuple[tuple[Any, Any], list[text.Tokens]]:
    """The tokenizers, which know new words, and the chunks of all prompts."""
    tokenizers = tokens.tokenizers(base, config.token)
    expanded = [tokens.expanded(config.token, prompt) for prompt in stock.prompts]
    return tokenizers, text.tokenize(tokenizers, expanded, config.text)


def samples(config: Config, base: Base, stock: Stock, count: int) -> Samples:
    """What batches are made of, for a schedule of that many timesteps."""
    chunks = dict(zip(stock.prompts, read(config, base, stock)[1], strict=True)) if not stock.text_cached else None
    made = Samples(
        stock.pictures,
        stock.choices,
        stock.keys,
        stock.latents,
        Words(
            stock.keys,
            stock.texts,
            chunks,
            0 if base.refines else base.config("text_encoder")["hidden_size"],
            config.text,
        ),
        {},
        config.seed,
        config.objective,
        timesteps.clock(config.timesteps, count, config.train.batch_size),
        model.latent_scale(base.config("vae")),
        holes=stock.holes,
        refines=base.refines,
        dropout=bool(config.adapter and config.adapter.dropout),
    )
    return replace(made, dropped=dropped_caption(config, base, made))


def measured_samples(config: Config, base: Base, stock: Stock, timesteps: int) -> dict[str, Samples]:
    """The pictures whose loss is measured, `held_out` before `trained`: each in its first geometry, its first caption
    never changed or left out."""
    plain = {"caption_dropout": 0.0, "weight": 1.0}
    whole = config.text.model_copy(update={"drop_encoder_1": 0.0, "drop_encoder_2": 0.0})
    found = {}
    for name, chosen in (("held_out", stock.held_out if stock.measured else ()), ("trained", stock.trained_part)):
        if chosen:
            choices = captions.plain(config.data, _records(config, chosen))
            pictures = [replace(p, data=p.data.model_copy(update=plain)) for p in chosen]
            made = samples(config, base, replace(stock, pictures=pictures, choices=choices), timesteps)
            found[name] = replace(made, words=replace(made.words, options=whole))
    return found


def dropped_caption(config: Config, base: Base, samples: Samples) -> dict[str, Tensor]:
    """What stands for a caption that is left out. The pipeline's own is zeros where the model says so
    (`force_zeros_for_empty_prompt`, true for SDXL base), else the embedding of the empty caption."""
    empty = samples.words.of(EMPTY)
    choice = config.text.dropped_caption
    if choice == "zeros" or (choice == "pipeline" and base.zeros_for_empty()):
        kept = {"tokens", "weights"}
        return {name: value if name in kept else torch.zeros_like(value) for name, value in empty.items()}
    return empty
