"""How often the pictures of several data sets are seen, and which are held out."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import base as bases
from sdxl_trainer.config import Config
from sdxl_trainer.data import loader, plan, prepare
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.errors import UserError

BUCKETS = {"buckets": "area", "bucket_step": 8, "bucket_min": 24}


def taken(made: Config, tmp_path: Path) -> Stock:
    return prepare.take_stock(made, bases.resolve(made.model, tmp_path), "fp32")


def seen(made: Config, stock: Stock, epoch: int = 0, processes: int = 1, micro: int = 2) -> Counter[tuple[int, str]]:
    """(data set, picture) -> how often an epoch trains on it with weight."""
    order = prepare.order(made, stock)
    found: Counter[tuple[int, str]] = Counter()
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        for rank in range(processes):
            for part in plan.share(order, order.step(step)[1], micro, rank, processes):
                for sample, counts in part:
                    picture = stock.pictures[sample % len(stock.pictures)]
                    found[next(i for i, d in enumerate(made.data) if d is picture.data), picture.name] += counts
    return found


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_repeats_of_several_data_sets(config: Callable[..., Any], tmp_path: Path, processes: int) -> None:
    sets = [{"repeats": 3.0, **BUCKETS}, {"max_samples": 4, "resolution": 72}, {"repeats": 2, "more_resolutions": [48]}]
    made = config(data=sets, train={"batch_size": 4})
    stock = taken(made, tmp_path)
    counts = seen(made, stock, processes=processes)
    assert sorted(counts.values()) == [1] * 4 + [3] * 6 + [4] * 6, "the last set twice at each of two resolutions"
    assert counts == seen(made, stock, processes=1)
    assert prepare.order(made, stock).steps_per_epoch == -(-(18 + 4 + 24) // 4)


def test_fractions_and_weights(config: Callable[..., Any], tmp_path: Path) -> None:
    made = config(data=[{"repeats": 0.5, **BUCKETS}, {}])
    stock = taken(made, tmp_path)
    two = [seen(made, stock, epoch) for epoch in (0, 1)]
    assert [sum(n for (which, _), n in one.items() if which == 0) for one in two] == [3, 3]
    assert sorted((two[0] + two[1]).values()) == [1] * 6 + [2] * 6
    made = config(data=[{"sampling_weight": 1, "max_samples": 2}, {"sampling_weight": 3.0}])
    counts = seen(made, taken(made, tmp_path))
    assert [sum(n for (which, _), n in counts.items() if which == i) for i in (0, 1)] == [2, 6]


def test_regularisation_is_seen_as_often_as_all_the_rest(config: Callable[..., Any], tmp_path: Path) -> None:
    made = config(data=[{"repeats": 5, "max_samples": 2}, {"regularisation": True, "weight": 0.5}, {"max_samples": 1}])
    stock = taken(made, tmp_path)
    epochs = [seen(made, stock, epoch) for epoch in range(6)]
    assert {sum(n for (which, _), n in one.items() if which == 1) for one in epochs} == {11}
    total = sum(epochs, Counter())
    regular = [n for (which, _), n in total.items() if which == 1]
    assert sorted(regular) == [11] * 6, "6 epochs of 11 are 11 passes over 6 pictures"


def test_repeats_are_samples_of_their_own(config: Callable[..., Any], tmp_path: Path) -> None:
    """The same picture twice in an epoch: another timestep, other noise; and the same ones in the next run."""
    made = config(data=[{"repeats": 2, "max_samples": 1}])
    base, stock = bases.resolve(made.model, tmp_path), taken(made, tmp_path)
    prepare.fill(made, base, stock, torch.device("cpu"), lambda *_: None, print)
    samples, order = prepare.samples(made, base, stock, 1000), prepare.order(made, stock)
    batch = loader.batch(samples, *[(0, [(s, True) for s in order.step(0)[1]])][0])
    assert len(set(batch.names)) == 1
    assert not torch.equal(batch.noise[0], batch.noise[1])
    assert torch.equal(batch.mean[0], batch.mean[1])


def test_held_out_pictures_are_not_trained_and_stay_on_their_side(
    config: Callable[..., Any], tmp_path: Path, pictures: Path
) -> None:
    import json

    from tests.conftest import draw_folder

    folder = tmp_path / "many"
    folder.mkdir()
    draw_folder(folder, [(64, 64 + index % 40) for index in range(200)])
    made = config(data=[{"path": str(folder), "held_out": 0.2}])
    stock = taken(made, tmp_path)
    trained, held = ({p.name for p in some} for some in (stock.pictures, stock.held_out))
    assert trained | held == {f"{index}.png" for index in range(200)}
    assert not trained & held
    assert 20 <= len(held) <= 60
    assert {name for _, name in seen(made, stock)} == trained
    more = taken(config(data=[{"path": str(folder), "held_out": 0.4}]), tmp_path)
    assert held < {p.name for p in more.held_out}, "a larger share holds the smaller"
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    for name in [f"{index}.png" for index in range(0, 200, 2)]:
        (folder / name).unlink()
    (folder / "metadata.jsonl").write_text(
        "\n".join(line for line in lines if (folder / json.loads(line)["file_name"]).is_file())
    )
    fewer = taken(config(data=[{"path": str(folder), "held_out": 0.2}], seed=7), tmp_path)
    assert {p.name for p in fewer.held_out} == {name for name in held if (folder / name).is_file()}


def test_nothing_left_to_train_on(config: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves no picture to train on"):
        taken(config(data=[{"held_out": 0.999, "max_samples": 1}]), tmp_path)
