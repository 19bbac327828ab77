"""Everything before the first step: read the data sets, fill the cache, hand out what batches are made of."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdxl_trainer import files, model, parameters, text, timesteps, tokens
from sdxl_trainer.base import Base
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Config, Inpainting, TextOptions
from sdxl_trainer.data import cache, captions, encode, holes, masks, mirrored, plan
from sdxl_trainer.data.captions import Choice
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.data.memo import Memo, open_memo
from sdxl_trainer.data.pictures import Picture, Pictures, held_out, load
from sdxl_trainer.data.problems import Notes, raise_all
from sdxl_trainer.data.records import Record
from sdxl_trainer.data.table import distinct
from sdxl_trainer.data.words import Words
from sdxl_trainer.errors import UserError, sentence, shortened

EMPTY = Prompt("")


@dataclass(frozen=True)
class Stock:
    """The data of a run beside what the cache holds of it."""

    pictures: Pictures  # what is trained
    held_out: Pictures
    choices: Sequence[Choice]  # what the text of each trained picture is drawn from
    more: tuple[Prompt, ...]  # prompts beside those of the trained pictures
    text_learns: bool
    text_cached: bool  # else captions are encoded in the step
    keys: encode.Keys
    latents: cache.Store
    texts: cache.Store
    memo: Memo
    digest: str  # of all that decides which rows are needed
    data_hash: str  # of all that decides what steps compute and is not in the config
    measured: bool = False  # whether the loss on held-out pictures is wanted
    holes: Inpainting | None = None  # how masks are drawn, for inpainting models
    trained_part: tuple[Picture, ...] = ()  # of the trained pictures those whose loss is wanted too

    @cached_property
    def prompts(self) -> encode.Prompts:
        """All distinct prompts: for validation, the empty one, and of the trained pictures."""
        said = np.concatenate([self.pictures.rows["source"][:, None], self.pictures.column("said")], axis=1)
        return encode.prompts(self.keys, self.more, self.choices, distinct(said))

    def texts_needed(self) -> int:
        """How many captions are to be in the cache."""
        return self.settled["texts"] if self.settled is not None else len(self.prompts)

    @property
    def cached(self) -> Pictures:
        """The pictures whose latents and masks are needed."""
        return self.pictures.and_also(self.held_out) if self.measured else self.pictures

    @cached_property
    def settled(self) -> dict[str, int] | None:
        """How many rows are needed, if it is known that all of them are there: then none need be looked for."""
        try:
            known = json.loads(self._record.read_text(encoding="utf-8"))
            there = set(known["shards"]) <= self.latents.all_shards() | self.texts.all_shards()
            return known["rows"] if there else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def settle(self) -> None:
        """Note that every row that is needed is there, in the shards of now."""
        if self.settled is None:
            rows = {"latents": self.needed[0], "texts": len(self.prompts) if self.text_cached else 0}
            shards = sorted(self.latents.all_shards() | self.texts.all_shards())
            with files.explained(self._record):
                self._record.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(self._record, {"rows": rows, "shards": shards})

    @property
    def _record(self) -> Path:
        return self.memo.path.parent / "settled" / f"{self.digest[:32]}.json"

    @cached_property
    def needed(self) -> tuple[int, encode.Work]:
        """How many latents are needed, and those that were missing at the first look."""
        if self.settled is not None:
            return self.settled["latents"], encode.Work(self.cached, np.zeros((0, 2), "<i8"))
        return encode.wanted(self.latents, self.cached, lambda p, g: [self.keys.latent(p, g)])

    def missing_latents(self) -> encode.Work:
        return self.needed[1]

    def missing_holes(self) -> encode.Work:
        if self.settled is not None or self.holes is None:
            return encode.Work(self.cached, np.zeros((0, 2), "<i8"))
        return holes.missing(self.latents, self.keys, self.cached, self.holes)

    def missing_masks(self) -> list:
        return [] if self.settled is not None else masks.missing(self.latents, self.cached)

    def missing_texts(self) -> encode.Prompts:
        if self.settled is not None or not self.text_cached:
            return encode.prompts(self.keys, (), (), np.zeros(0, "<i8"))
        return self.prompts.lacking(self.texts)


class Numbered(Sequence[tuple[int, Record]]):
    """Each picture's record with the number of its data set."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        row = self.pictures.rows[index]
        return int(row["source"]), self.pictures.sources[row["source"]].records[int(row["record"])]


def cache_folder(config: Config) -> Path:
    return Path(config.cache.path or Path(config.output_dir) / "cache").expanduser()


def take_stock(
    config: Config, base: Base, text_precision: str, notes: Notes | None = None, memo: Memo | None = None
) -> Stock:
    """Read data sets, sizes and hashes; look up what is cached. Encodes nothing. With `notes` pictures that cannot be
    used are noted and left out, as long as there are others. `memo` if it was opened a moment ago."""
    folder, memo = cache_folder(config), memo or open_memo(cache_folder(config))
    if config.cache.mirror:
        mirrored.take_in(folder, config.cache.mirror, memo)
    found = load(config, memo, notes)
    if notes is not None and len(np.unique(found.rows["source"])) < len(config.data):
        load(config, memo)  # nothing is left of a data set: the error that says why
    out = held_out(found)
    pictures = found.take(np.flatnonzero(~out)) if out.any() else found
    unseen = found.take(np.flatnonzero(out), plain=True)
    measured = config.validation.loss_every is not None and len(unseen) > 0
    part = _trained_part(config, pictures)
    _refuse_empty(config, pictures)
    _refuse_twice(config, pictures, unseen)
    text.refuse_clip_skip(base, config.text)
    choices = captions.Choices(config.data, Numbered(pictures))
    if config.token and any(data.prior_prediction for data in config.data):
        _refuse_new_words(config, pictures, choices)
    looked_at = captions.plain(config.data, _records(config, [*(unseen if measured else []), *part]))
    wanted = [config.validation.negative or "", *config.validation.prompts]
    drawn = [*(written(config.text, p) for p in wanted), *(p for choice in looked_at for p in choice.prompts())]
    keys = encode.keys(base, config.cache, config.text, text_precision, memo)
    latents, texts = mirrored.open_stores(folder, config.cache.mirror)
    learns = parameters.text_learns(config, text.parameter_names(base))
    cached = config.text.cache and not learns
    if learns and not config.text.cache:
        what = "text.cache = false has no effect: text encoders that learn encode every caption in the step"
        raise UserError(what, "text.cache", "remove it")
    more = tuple(dict.fromkeys([EMPTY, *drawn]))
    said = [pictures.digest(), captions.wildcards(config.data)]
    options = [data.model_dump(mode="json", exclude={"path"}) for data in config.data]
    beside = [unseen.digest() if measured else None, [p.content for p in part], cached]
    prompts = [[*prompt.texts, prompt.emphasis] for prompt in more]
    hidden = config.inpainting if base.inpaints else None
    drawing = [hidden.model_dump(mode="json") if hidden else None, holes.VERSION, masks.VERSION]
    digest = cache.key(said, options, beside, prompts, keys.described(), drawing)
    stock = Stock(
        pictures,
        unseen,
        choices,
        more,
        learns,
        cached,
        keys,
        latents,
        texts,
        memo,
        digest,
        cache.key(said, keys.vae, keys.text),
        measured,
        hidden,
        part,
    )
    if config.token:
        tokens.refuse_unread(config.token, (words for prompt in stock.prompts for words in prompt.texts))
    return stock


def _trained_part(config: Config, pictures: Pictures) -> tuple[Picture, ...]:
    """Trained pictures to measure, chosen by their bytes alone, each in its first geometry."""
    if config.validation.loss_every is None:
        return ()
    learned: dict[str, int] = {}
    for number, data in enumerate(config.data):
        contents = {} if data.regularisation else dict(_contents(pictures, number))
        learned |= {cache.key("trained part", content): index for content, index in contents.items()}
    chosen = nsmallest(config.validation.trained_pictures, learned)
    return tuple(pictures.take(np.array([learned[name] for name in chosen], dtype="<i8"), plain=True))


def _contents(pictures: Pictures, source: int) -> Iterator[tuple[str, int]]:
    """(content, number) of the pictures of one data set."""
    for index in pictures.of(source).tolist():
        yield pictures.sources[source].content[pictures.rows["record"][index]].tobytes().hex(), index


def _records(config: Config, pictures: Sequence[Picture]) -> list[tuple[int, Record]]:
    """Each picture's record with the number of its data set."""
    numbers = {id(data): number for number, data in enumerate(config.data)}
    return [(numbers[id(picture.data)], picture.record) for picture in pictures]


def written(options: TextOptions, prompt: str) -> Prompt:
    """A validation prompt, its emphasis read if any is."""
    return Prompt(prompt, emphasis=options.emphasis != "off")


def _refuse_empty(config: Config, pictures: Pictures) -> None:
    for index, data in enumerate(config.data):
        if data.held_out < 1 and not len(pictures.of(index)):
            what = f"held_out = {data.held_out:g} leaves no picture to train on"
            raise UserError(what, f"data.{index}.path = '{data.path}'", "hold out less, or add pictures")


def _refuse_twice(config: Config, pictures: Pictures, unseen: Pictures) -> None:
    """A picture of a data set for validation alone that is trained as well would make the loss a lie."""
    ours = [number for number, data in enumerate(config.data) if data.held_out == 1]
    seen = {content for n in range(len(config.data)) for content, _ in _contents(pictures, n)} if ours else set()
    for number in ours:
        twice = [unseen[index].name for content, index in _contents(unseen, number) if content in seen]
        if twice:
            what = f"{sentence(len(twice), 'pictures are held out and trained too')}: {shortened(twice)}"
            raise UserError(what, f"data.{number}.path = '{config.data[number].path}'", "remove them from one of them")


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
    numbers = plan.least(len(stock.pictures), 1)
    members = [stock.pictures.of(number).astype(numbers) for number in range(len(config.data))]
    repeats = stock.pictures.column("repeats")
    stock.pictures.let_go()
    entries = [int(repeats[m].sum()) for m in members]
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
            counts[number] = max(1, round(share)) if data.held_out < 1 else 0
    learned, others = sum(counts.values()), sum(entries) - sum(trained)
    streams = [
        plan.Stream(
            m,
            repeats[m],
            counts[number] if number in counts else max(1, round(learned * entries[number] / others)),
            config.data[number].regularisation,
        )
        for number, m in enumerate(members)
    ]
    return plan.make(config.seed, config.train.batch_size, stock.pictures.rows["target"], streams)


def fill(
    config: Config,
    base: Base,
    stock: Stock,
    device: torch.device,
    progress: encode.Progress,
    say: Callable[[str], None],
    rank: int = 0,
    processes: int = 1,
    gathered: Callable[[list[Any]], list[Any]] = list,
) -> None:
    """Encode what is missing. Several processes share the work and meet in `gathered`, which gives all their rows."""
    # All lists come first: rows that other processes have already written must not shift the shares.
    texts, work = stock.missing_texts(), stock.missing_latents()
    prompts, latents = texts[rank::processes], work[rank::processes]
    mine = stock.missing_masks()[rank::processes]
    hidden = stock.missing_holes()[rank::processes]
    raise_all(masks.fill(stock.latents, mine, progress) if mine else ())
    with encode.explained():
        # The pictures begin to be decoded while the encoders' libraries are imported and captions encoded.
        pictures = encode.decoded(latents, config.cache) if latents else iter(())
        cut: list[tuple[int, list[text.Cut]]] = []
        if prompts:
            cut = [encode.fill_texts(base, config.cache, stock.texts, stock.keys, prompts, device, progress)]
        found = gathered(cut)
        first = [one for _, some in found for one in some][: text.SHOWN]
        _say_cut(sum(count for count, _ in found), first, config.text, say)
        if not stock.text_cached:
            _say_cut(*tokens.too_long(base, config.token, config.text, stock.prompts), config.text, say)
        if latents:
            count = len(latents)
            encode.fill_latents(base, config.cache, stock.latents, stock.keys, count, pictures, device, progress)
        if hidden and stock.holes:
            holes.fill(base, config.cache, stock.latents, stock.keys, hidden, stock.holes, device, progress)
    gathered([])
    for store in (stock.texts, stock.latents):
        store.refresh()
        if rank == 0:
            store.save()
    encode.refuse_unshared(stock.keys, stock.texts, texts, stock.latents, work)
    if rank == 0:
        stock.settle()


def _say_cut(count: int, first: Sequence[text.Cut], options: TextOptions, say: Callable[[str], None]) -> None:
    if count:
        some = ", ".join(f"'{c.prompt.text[:40]}' loses {c.tokens}" for c in first)
        more = f" and {count - len(first)} more" if count > len(first) else ""
        long = sentence(count, f"captions have more than {text.longest(options)} tokens")
        say(f"{long}, the rest is cut off: {some}{more}")


def samples(
    config: Config,
    base: Base,
    stock: Stock,
    count: int,
    pictures: Sequence[Picture] | None = None,
    choices: Sequence[Choice] | None = None,
) -> Samples:
    """What batches are made of, for a schedule of that many timesteps; of the trained pictures, or those given."""
    made = Samples(
        stock.pictures if pictures is None else pictures,
        stock.choices if choices is None else choices,
        stock.keys,
        stock.latents,
        Words(
            stock.keys,
            stock.texts,
            None if stock.text_cached else tokens.reader(base, config.token, config.text),
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
    never changed, and left out only where that is what is measured."""
    whole = config.text.model_copy(update={"drop_encoder_1": 0.0, "drop_encoder_2": 0.0})
    held_out = stock.held_out if stock.measured else ()
    untold = held_out if config.validation.caption_gain else ()
    sets = (("held_out", held_out, 0.0), ("uncaptioned", untold, 1.0), ("trained", stock.trained_part, 0.0))
    found = {}
    for name, chosen, dropout in sets:
        if chosen:
            choices = captions.plain(config.data, _records(config, chosen))
            plain = {"caption_dropout": dropout, "weight": 1.0}
            pictures = [replace(p, data=p.data.model_copy(update=plain)) for p in chosen]
            made = samples(config, base, stock, timesteps, pictures, choices)
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
