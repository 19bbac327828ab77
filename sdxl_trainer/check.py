"""`sdxl check`: what a run will do and cost, before anything is spent."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_trainer import base as bases
from sdxl_trainer import (
    class_pictures,
    disk,
    distributed,
    hub,
    kinds,
    model,
    optim,
    overview,
    parameters,
    presets,
    resume,
    setup,
    text,
    tokens,
    trackers,
)
from sdxl_trainer import memory as memories
from sdxl_trainer.base import Base
from sdxl_trainer.config import Config, steps_of
from sdxl_trainer.data import findings, ledger, mirrored, plan, prepare, problems
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.data.table import present
from sdxl_trainer.errors import UserError, plural, sentence, shortened
from sdxl_trainer.report import dataset
from sdxl_trainer.run import CONTINUE

# Pictures whose captions are read.
LOOKED_AT = 20_000


def run(config: Config, *, as_json: bool = False, report: bool = False) -> None:
    """Print the report, as JSON if wanted, or write it as a page. Everything that a run would refuse is refused here
    too: page and JSON are written first, since they list it."""
    notes = problems.Notes() if as_json or report else None
    lines: list[str] = []
    precision = setup.computing(config, lines)
    base = bases.resolve(config.model, prepare.cache_folder(config))
    kinds.refuse(config, base)
    setup.noise_schedule(config, base)
    optim.refuse(config.optimizer, config.train, torch.device(distributed.device_type()))
    orders = class_pictures.missing(config, base, open_memo(prepare.cache_folder(config)))
    for lack in orders:
        lacking = f"{plural(len(lack.numbers), 'class picture')} of '{lack.prompt(0)}' will be drawn first"
        lines.append(f"{lacking}, into {lack.folder}: the figures are without this data set")
    config = setup.complete(config, orders)
    if not config.data:
        print("\n".join(lines))
        return
    stock = prepare.take_stock(config, base, precision, notes)
    trackers.refuse(config.log)
    hub.refuse_name(Path(config.output_dir).expanduser(), config.hub)
    order = prepare.order(config, stock)
    output = Path(config.output_dir).expanduser()
    begin = resume.starting_point(config, base, CONTINUE, output, stock, order, lines.append)
    if begin.done:
        lines.append(f"already done: {plural(begin.steps, 'step')}, in {config.output_dir}")
    elif begin.checkpoint:
        lines.append(f"continues after step {begin.checkpoint.step} ({begin.checkpoint.path})")
    alone = distributed.one_pass(config, int(os.environ.get("WORLD_SIZE", "1")), len(present(order.group_of)))
    groups, sdxl = setup.learning(config, base, stock, begin.checkpoint)
    free = distributed.free_memory() if config.train.memory == "auto" else 0.0
    config = setup.fitted(config, groups, sdxl, stock, precision, lines.append, alone, free, begin.checkpoint)
    unet = sum(p.numel() for p in sdxl.parameters())
    need = disk.need(config, base, stock, order, groups, sdxl, begin)
    words = captions(config, base, stock)
    tables = {
        "what will learn": _learns(config, groups, unet),
        "data": _data(config, stock, order),
        "captions": findings.lines(words),
        "cache": _cache(config, base, stock),
        "disk": _disk(need, config.output_dir),
        "memory": memory(config, stock, groups, sdxl, precision),
    }
    if notes is None:
        for title, rows in tables.items():
            _table(title, rows)
        for line in lines:
            print(line)
        return
    whole: dict[str, Any] = {"tables": {title: dict(rows) for title, rows in tables.items()}, "notes": lines}
    whole["captions"] = words.to_json()
    whole |= overview.facts(config, base, stock, order, begin.steps, sdxl, words, notes)
    if report:
        print(dataset.write(Path(config.output_dir).expanduser() / "check.html", whole))
    if as_json:
        del whole["thumbnails"]
        print(json.dumps(whole, ensure_ascii=False, indent=1))
    raise_first(whole["findings"])


def raise_first(found: list[dict[str, Any]]) -> None:
    """UserError for what stops the run."""
    stops = [finding for finding in found if finding["level"] == "stops"]
    if stops:
        what = "; ".join(sentence(finding["count"], finding["what"]) for finding in stops)
        listed = shortened((name for finding in stops for name, _ in finding["examples"]), 8)
        raise UserError(what, listed, "; ".join(dict.fromkeys(finding["fix"] for finding in stops)))


def captions(config: Config, base: Base, stock: Stock) -> findings.Captions:
    """What the captions are like; of a large set those of `LOOKED_AT` pictures, evenly spread."""
    count = len(stock.pictures)
    numbers = np.arange(count) if count <= LOOKED_AT else np.arange(LOOKED_AT) * count // LOOKED_AT
    choices = [stock.choices[int(number)] for number in numbers]
    prompts = list(dict.fromkeys(prompt for choice in choices for prompt in choice.prompts()))
    tokenizers = tokens.tokenizers(base, config.token)
    chunks = tokens.chunks(tokenizers, config.token, config.text, prompts)
    cut = text.cuts(tokenizers, prompts, chunks)
    pictures = stock.pictures.take(numbers)
    return findings.captions(config, pictures, choices, dict(zip(prompts, chunks, strict=True)), cut)


def memory(
    config: Config, stock: Stock, groups: list[parameters.Group], sdxl: model.SDXL, precision: str
) -> list[tuple[str, str]]:
    """Bytes of weights, gradients, optimizer, averages and activations while training."""
    step = memories.step(config, setup.shapes(stock), precision, distributed.device_type())
    parts = memories.parts(config, sdxl, groups, step)
    rows = {**parts, "together": sum(parts.values())}
    # Beside a GPU that is memory of the host, which is not what runs out.
    process = [("not counted", "Python with its libraries, about half a GB")] if step.device == "cpu" else []
    return [(name, dataset.size(value)) for name, value in rows.items() if value] + process


def _learns(config: Config, groups: list[parameters.Group], unet: int) -> list[tuple[str, str]]:
    others = [f"{option} = {value}" for option, value, _ in presets.differences(config)]
    rows = (
        [("preset", f"{config.preset}, but {', '.join(others)}" if others else config.preset)] if config.preset else []
    )
    rows += [
        (
            group.rule,
            f"{plural(group.size, 'parameter')} in {plural(len(group.names), 'tensor')},"
            f" learning rate {group.learning_rate:g}",
        )
        for group in groups
    ]
    frozen = unet - sum(group.size for group in groups)
    rate = presets.effective_rate(config)
    rows += [("effective learning rate", f"{rate[0]:g} = {rate[1]}")] if rate else []
    return [*rows, ("frozen", f"{plural(frozen, 'parameter')} of what is in memory while training; the VAE")]


def _data(config: Config, stock: Stock, order: plan.Plan) -> list[tuple[str, str]]:
    variants = sum(
        len(stock.pictures.of(number)) * (1 + data.flip)
        if data.crop == "center"
        else sum(len(stock.pictures[int(i)].geometries) for i in stock.pictures.of(number))
        for number, data in enumerate(config.data)
    )
    steps = config.train.steps or (config.train.epochs or 0) * order.steps_per_epoch
    rows = [
        ("pictures", f"{len(stock.pictures)}, with {plural(variants, 'crop', 'crops and flips')}"),
        ("steps", f"{order.steps_per_epoch} per epoch; {steps} in all, {order.epochs(steps)}"),
        *_often(config, order).items(),
    ]
    return rows + ledger.rows(config, stock, order)


def _often(config: Config, order: plan.Plan) -> dict[str, str]:
    """What happens in epochs, in steps."""
    options = {
        "checkpoints": config.train.checkpoint_every,
        "validation pictures": config.train.validate_every,
        "validation loss": config.validation.loss_every,
    }
    epochs = {name: every for name, every in options.items() if isinstance(every, str)}
    return {name: f"every {every}: {steps_of(every, order.steps_per_epoch)} steps" for name, every in epochs.items()}


def _cache(config: Config, base: Base, stock: Stock) -> list[tuple[str, str]]:
    (wanted, latents), texts = stock.needed, stock.missing_texts()
    bytes_ = latents.cells() * disk.LATENT
    rows = [
        ("latents", f"{wanted - len(latents)} cached, {len(latents)} to encode ({dataset.size(bytes_)})"),
        ("captions", _texts(base, stock, len(texts))),
    ]
    if stock.latents.beyond is not None:
        count, shards = mirrored.size((stock.latents, stock.texts))
        rows.append(("mirror", f"{config.cache.mirror} holds {plural(count, 'row')} in {plural(shards, 'file')}"))
    return rows


def _texts(base: Base, stock: Stock, missing: int) -> str:
    if not stock.text_cached:
        return "none: the text encoders work in the step"
    chunk = dataset.size(disk.chunk(base, stock))
    return f"{stock.texts_needed() - missing} cached, {missing} to encode ({chunk} for each 75 tokens)"


def _disk(need: disk.Need, output: str) -> list[tuple[str, str]]:
    return [
        ("each checkpoint", dataset.size(need.checkpoint)),
        ("at most", f"{dataset.size(need.together)} more than now: {need.told()}"),
        ("free", f"{dataset.size(need.free)} at {output}{f': too little; {disk.FIX}' * (need.free < need.together)}"),
    ]


def _table(title: str, rows: list[tuple[str, Any]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print()
