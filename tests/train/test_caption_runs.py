"""Runs with caption options: the same captions after a resume, in any batch, on any number of processes; exactly what
changed is encoded anew."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import base as bases
from sdxl_trainer import checkpoint
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.data import loader, prepare
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Start
from sdxl_trainer.train import train
from tests.conftest import draw_folder
from tests.train.test_text_encoders import RULES

LINES = [
    "sks, red, green, blue",
    "a {red|blue} circle, square",
    "red (circle:1.4), square, " + "a blue square, " * 30,
    "sks, " + "a green circle, " * 60,
    "red",
    "[red] circle, blue",
]
OPTIONS = {
    "shuffle_tags": True,
    "tag_dropout": 0.2,
    "keep_tags": 1,
    "caption_dropout": 0.1,
    "wildcards": True,
    "trigger": "sks",
    "emphasis": True,
    "caption_variants": 4,
}
TEXT = {"emphasis": "a1111", "drop_encoder_1": 0.2, "drop_encoder_2": 0.2, "max_chunks": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.mkdir()
    draw_folder(path, [(64, 64)] * len(LINES))
    write(path, LINES)
    return path


def write(folder: Path, lines: list[str]) -> None:
    rows = [{"file_name": f"{i}.png", "text": line} for i, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def take_stock(config: Any, tmp_path: Path) -> prepare.Stock:
    return prepare.take_stock(config, bases.resolve(config.model, tmp_path), "fp32")


def make_samples(config: Any, tmp_path: Path) -> Samples:
    found = bases.resolve(config.model, tmp_path)
    stock = prepare.take_stock(config, found, "fp32")
    prepare.fill(config, found, stock, torch.device("cpu"), lambda *_: None, print)
    return prepare.samples(config, found, stock, 1000)


@pytest.mark.parametrize("way", ["cached", "in the step", "learning"])
def test_a_resumed_run_draws_the_same_captions(
    config: Callable[..., Any], tmp_path: Path, folder: Path, way: str
) -> None:
    text = TEXT | ({"cache": False} if way == "in the step" else {})
    options = {"data": [{"path": str(folder), **OPTIONS}], "text": text}
    options |= {"learn": RULES} if way == "learning" else {}
    whole = train(config(**options, output_dir=str(tmp_path / "whole")))
    train(config(**options, train={"steps": 2}))
    parted = train(config(**options), Start("continue"))
    assert losses(parted) == losses(whole)
    for part in ("unet", *(["text_encoder", "text_encoder_2"] if way == "learning" else [])):
        one, two = (checkpoint.read_weights(output / part) for output in (whole, parted))
        assert all(torch.equal(one[name], two[name]) for name in one)
    kept = {path.name for path in (whole / "checkpoint-4").iterdir()}
    assert ("text_encoder" in kept) == (way == "learning")


@pytest.mark.parametrize(
    ("long", "emphasis"), [("a1111", "a1111"), ("comfyui", "comfyui"), ("kohya", "a1111_no_norm"), ("cut", "a1111")]
)
def test_cached_and_working_encoders_give_one_loss(
    config: Callable[..., Any], tmp_path: Path, folder: Path, emphasis: str, long: str
) -> None:
    """Frozen and cached, frozen in the step, and learning: the first loss is the same."""
    found = []
    text = {**TEXT, "emphasis": emphasis, "long_captions": long, "dropped_caption": "empty"}
    if long == "cut":
        del text["max_chunks"]
    ways = {"cached": {"text": text}, "in the step": {"text": {**text, "cache": False}}}
    for name, way in {**ways, "learning": {"text": text, "learn": RULES}}.items():
        sizes = {"steps": 1, "batch_size": 6, "checkpoint_every": 0}
        made = config(data=[{"path": str(folder), **OPTIONS}], train=sizes, output_dir=str(tmp_path / name), **way)
        found += losses(train(made))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_micro_batches_of_prompts_of_any_length_do_not_change_the_result(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    found = []
    for micro in (6, 1):
        sizes = {"batch_size": 6, "micro_batch": micro, "steps": 3, "learning_rate": 1e-4, "checkpoint_every": 0}
        made = config(
            data=[{"path": str(folder), **OPTIONS}], text=TEXT, train=sizes, output_dir=str(tmp_path / str(micro))
        )
        found.append(losses(train(made)))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_captions_belong_to_samples_and_not_to_batches(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    made = make_samples(config(data=[{"path": str(folder), **OPTIONS}], text=TEXT), tmp_path)
    for epoch in range(4):
        together = loader.batch(made, epoch, [(sample, True) for sample in range(6)]).text["prompt_embeds"]
        for sample in range(6):
            alone = loader.batch(made, epoch, [(sample, True)]).text["prompt_embeds"][0]
            assert torch.equal(together[sample], alone.repeat(len(together[sample]) // len(alone), 1))


def test_variants_and_dropped_encoders_are_drawn_as_often_as_asked(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    data = {"path": str(folder), "wildcards": True, "caption_variants": 4, "caption_dropout": 0.25}
    text = {"drop_encoder_1": 0.3, "drop_encoder_2": 0.5, "dropped_caption": "zeros"}
    made = make_samples(config(data=[data], text=text), tmp_path)
    drawn = Counter(loader.caption(made, epoch, 1) for epoch in range(1200))
    assert drawn[None] / 1200 == pytest.approx(0.25, abs=0.05)
    assert drawn[Prompt("a red circle, square")] / 1200 == pytest.approx(0.375, abs=0.05)
    assert drawn[Prompt("a blue circle, square")] / 1200 == pytest.approx(0.375, abs=0.05)
    gone = Counter()
    for epoch in range(400):
        found = loader._text(made, epoch, 1)
        words = made.words.of(found) if isinstance(found, Prompt) else found
        kept = loader.caption(made, epoch, 1) is not None
        first, second = (
            bool((part == 0).all()) for part in words["prompt_embeds"].tensor_split([made.words.width], dim=1)
        )
        assert second == bool((words["pooled"] == 0).all())
        gone.update([("first", first), ("second", second), ("both", first and second)] if kept else ["none"])
    kept_count = 400 - gone["none"]
    assert gone["first", True] / kept_count == pytest.approx(0.3, abs=0.08)
    assert gone["second", True] / kept_count == pytest.approx(0.5, abs=0.08)
    assert gone["both", True] / kept_count == pytest.approx(0.15, abs=0.06)


def test_exactly_what_changed_is_encoded_anew(config: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    options = {"data": [{"path": str(folder), **OPTIONS}], "text": TEXT, "cache": {"path": str(tmp_path / "fresh")}}
    all_of_them = len(take_stock(config(**options), tmp_path).missing_texts())
    make_samples(config(**options), tmp_path)

    def missing(**changed: Any) -> int:
        merged = {**options, **changed}
        return len(take_stock(config(**merged), tmp_path).missing_texts())

    assert all_of_them > 10
    assert missing() == missing(train={"learning_rate": 0.5}, seed=7) == 0
    assert missing(text={**TEXT, "drop_encoder_1": 0.9}) == 0
    write(folder, [*LINES[:4], "blue, green, red, circle", LINES[5]])
    edited = take_stock(config(**options), tmp_path)
    assert set(edited.missing_texts()) == set(edited.choices[4].prompts())
    assert 1 < len(edited.missing_texts()) <= 4
    write(folder, LINES)
    assert missing() == 0
    assert missing(text={**TEXT, "clip_skip": 1}) == all_of_them
    assert missing(data=[{"path": str(folder), **OPTIONS, "caption_variants": 5}]) > 0


def test_another_wildcard_file_is_another_run(config: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    from sdxl_trainer.errors import UserError

    wild = tmp_path / "wild"
    wild.mkdir()
    (wild / "colour.txt").write_text("red\nblue\n")
    write(folder, ["a __colour__ circle"] * len(LINES))
    data = [{"path": str(folder), "wildcards": True, "wildcards_dir": str(wild)}]
    train(config(data=data, train={"steps": 2}))
    (wild / "colour.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(UserError, match="captions"):
        train(config(data=data))


def test_captions_for_the_second_encoder_come_from_their_column(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    rows = [{"file_name": f"{i}.png", "text": ["a", "b"], "long": ["c", "d"]} for i in range(len(LINES))]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder), "caption_column_2": "long", "caption_weights": [1.0, 3.0]}
    stock = take_stock(config(data=[data]), tmp_path)
    assert stock.choices[0].prompts() == [Prompt("a", "c"), Prompt("b", "d")]
    assert stock.choices[0].odds == (0.25, 1.0)


def test_each_line_of_a_caption_file_may_be_a_caption(config: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    for number in range(len(LINES)):
        (folder / f"{number}.txt").write_text("first line\n\n second, line \n")
    whole = take_stock(config(data=[{"path": str(folder)}]), tmp_path).pictures[0].captions
    lines = take_stock(config(data=[{"path": str(folder), "caption_per_line": True}]), tmp_path).pictures[0].captions
    assert whole == ("first line\n\n second, line",)
    assert lines == ("first line", "second, line")
