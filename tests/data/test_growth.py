"""What a picture costs in memory, and what a start does not read again."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from handmade import encoded
from PIL import Image

from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Config, TextOptions
from sdxl_trainer.configfile import validated
from sdxl_trainer.data import captions, encode, memo, pictures, plan, table
from sdxl_trainer.data.sources import records


def parquet(folder: Path, count: int) -> None:
    content = encoded(Image.new("RGB", (8, 8)))
    # Whatever follows the end of a PNG is not looked at.
    images = [{"bytes": content + number.to_bytes(4, "big"), "path": None} for number in range(count)]
    folder.mkdir(exist_ok=True)
    captions = [f"caption {number} of {count}" for number in range(count)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": captions}), folder / "train.parquet")


def config(root: Path) -> Config:
    return validated(
        {
            "output_dir": str(root / "run"),
            "model": {"path": "none"},
            "data": [{"path": str(root / "set"), "resolution": 8}],
            "cache": {"path": str(root / "cache"), "datasets_dir": str(root / "datasets")},
            "train": {"steps": 1, "batch_size": 4, "learning_rate": 1e-4},
        },
        "test",
    )


def held(root: Path, count: int) -> tuple[int, str]:
    """Bytes that a warm start needs at most for the pictures and the order of an epoch; and what it found."""
    datasets.disable_progress_bars()
    root.mkdir()
    parquet(root / "set", count)
    pictures.load(config(root), memo.open_memo(root / "cache"))
    tracemalloc.start()
    found = pictures.load(config(root), memo.open_memo(root / "cache"))
    digest = found.digest()
    order = plan.make(0, 4, found.rows["target"])
    order.step(0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most, digest


def test_a_picture_costs_few_bytes(tmp_path: Path) -> None:
    """The target is 200 bytes of a process's memory for each; what maps and allocators add needs room too."""
    few, many = 500, 12_500
    (small, _), (large, _) = held(tmp_path / "few", few), held(tmp_path / "many", many)
    assert (large - small) / (many - few) <= 130


def listed(count: int) -> int:
    """Bytes that the list of what is to be encoded of so many captions, each with two variants, takes at most."""
    keys = encode.Keys("", "", "", "", TextOptions())

    def choice(number: int) -> captions.Choice:
        said = Prompt(f"a long caption of the picture number {number}, and more about it")
        return captions.Choice((1.0,), ((said, replace(said, text=said.text[::-1])),))

    class Each(list):  # made anew each time, as those of pictures are
        def __getitem__(self, number: Any) -> captions.Choice:
            return choice(number)

    tracemalloc.start()
    found = encode.prompts(keys, (Prompt(""),), Each(), np.arange(count))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 2 * count + 1
    assert [found[0], found[2 * count]] == [Prompt(""), choice(count - 1).variants[0][1]]
    assert list(found[3::2][:2]) == [choice(1).variants[0][0], choice(2).variants[0][0]]
    return most


def test_a_caption_to_be_encoded_costs_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BATCH", 512)  # what is looked at together is not what grows
    few, many = 1024, 8192
    assert (listed(many) - listed(few)) / (2 * (many - few)) <= 110


def test_prompts_that_are_alike_are_one() -> None:
    keys = encode.Keys("", "", "", "", TextOptions())
    a, b, other = Prompt("a"), Prompt("b"), Prompt("a", "b")
    choices = [captions.Choice((1.0,), ((a, other), (b,))), captions.Choice((1.0,), ((b, Prompt("c"), a),))]
    found = encode.prompts(keys, (Prompt(""), b), choices, np.array([0, 1]))
    assert list(found) == [Prompt(""), b, a, other, Prompt("c")]
    assert [list(found[n::2]) for n in range(2)] == [[Prompt(""), a, Prompt("c")], [b, other]]


def test_a_known_dataset_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    parquet(tmp_path / "set", 20)

    def read() -> list[tuple[str, Any, bytes]]:
        options = config(tmp_path)
        hub, index = options.cache.datasets_dir, tmp_path / "cache" / "shards"
        found = records(options.data[0], seed=0, where="data.0.path", datasets_dir=hub, index_dir=index)
        return [(record.name, record.captions, record.read()) for record in found]

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    first = read()
    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetBuilder, "as_dataset", refused)
        assert read() == first
    parquet(tmp_path / "set", 21)
    assert len(read()) == 21


def test_rows_that_are_alike() -> None:
    rows = np.array([[1, 2], [3, 4], [1, 2], [1, 3], [3, 4], [0, 2]])
    assert table.distinct(rows).tolist() == [0, 1, 3, 5]
    assert table.distinct(rows[:0]).tolist() == []
    order, begins = table.grouped(rows)
    groups = [part.tolist() for part in np.split(order, np.flatnonzero(begins)[1:])]
    assert sorted(groups) == [[0, 2], [1, 4], [3], [5]]


def test_columns_come_back_after_they_were_let_go(tmp_path: Path) -> None:
    columns = {"key": np.arange(5000), "size": np.arange(10_000, dtype="<i4").reshape(-1, 2)}
    table.save_columns(tmp_path / "a.table", columns, {"of": "a"})
    opened = table.open_columns(tmp_path / "a.table", {"key": (), "size": (2,)})
    assert opened is not None
    for _ in range(2):
        assert all((opened[0][name] == columns[name]).all() for name in columns)
        table.let_go(opened[0].values())
