"""Batches: what was asked to be random is drawn anew each time, and depends on nothing but its key."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_trainer import base as bases
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.data import loader, prepare
from sdxl_trainer.data.loader import Batch, Samples


@pytest.fixture
def samples(config: Callable[..., Any], tmp_path: Path) -> Callable[..., Samples]:
    def make(**options: Any) -> Samples:
        made = config(**options)
        found = bases.resolve(made.model, tmp_path)
        stock = prepare.take_stock(made, found, "fp32")
        prepare.fill(made, found, stock, torch.device("cpu"), lambda *_: None, print)
        return prepare.samples(made, found, stock, 1000)

    return make


def whole(count: int) -> list[tuple[int, bool]]:
    return [(sample, True) for sample in range(count)]


def equal(one: Batch, two: Batch) -> bool:
    return one.names == two.names and all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def tensors(batch: Batch) -> list[torch.Tensor]:
    found = [getattr(batch, f.name) for f in fields(Batch) if f.name not in {"names", "text"}] + [*batch.text.values()]
    return [tensor for tensor in found if tensor is not None]


def test_a_sample_is_the_same_in_any_batch(samples: Callable[..., Samples]) -> None:
    made = samples(data=[{"crop": "random", "flip": True, "caption_dropout": 0.5}])
    together = loader.batch(made, 3, whole(6))
    for sample in range(6):
        alone = loader.batch(made, 3, [(sample, True)])
        for one, all_ in zip(tensors(alone), tensors(together), strict=True):
            assert torch.equal(all_[sample], one[0])


def test_prompts_of_different_lengths_share_a_batch_by_repetition(samples: Callable[..., Samples]) -> None:
    """Read from the cache, left out, or with one encoder's part left out: each is what it is alone, repeated."""
    long, text = "a red circle " * 40, {"long_captions": "a1111", "max_chunks": 3}
    made = samples(data=[{}, {"caption_suffix": long, "max_samples": 2}], text=text)
    prompts = [made.choice(sample).only for sample in (0, 6, 1)]
    assert None not in prompts
    whole: Any = [*prompts, made.dropped, made.words.without(prompts[1], 1, made.dropped)]
    alone = [made.words.of(one) if isinstance(one, Prompt) else one for one in whole]
    assert [made.words.length(one) // 77 for one in whole] == [1, 2, 1, 1, 2]
    together = made.words.together(whole)
    for row, text in enumerate(alone):
        assert torch.equal(together["pooled"][row], text["pooled"])
        expected = text["prompt_embeds"].repeat(154 // len(text["prompt_embeds"]), 1)
        assert torch.equal(together["prompt_embeds"][row], expected)


def test_crops_flips_and_noise_are_drawn_anew_every_epoch(samples: Callable[..., Samples]) -> None:
    made = samples(data=[{"crop": "random", "flip": True, "crops_per_image": 4}])
    epochs = [loader.batch(made, epoch, whole(6)) for epoch in range(40)]
    for name in ("noise", "posterior_noise"):
        drawn = torch.stack([getattr(b, name) for b in epochs]).flatten(0, 1)
        assert len({t.sum().item() for t in drawn}) == 240
    for sample, picture in enumerate(made.pictures):
        seen = {tuple(b.time_ids[sample].tolist()) for b in epochs}
        assert seen == {g.time_ids() for g in picture.geometries}
        assert len({b.mean[sample].float().sum().item() for b in epochs}) == len(picture.geometries)


def test_latents_are_those_of_the_geometry_that_the_time_ids_name(samples: Callable[..., Samples]) -> None:
    made = samples(data=[{"crop": "random", "flip": True}])
    for epoch in range(10):
        drawn = loader.batch(made, epoch, whole(6))
        for sample, picture in enumerate(made.pictures):
            rows = [
                made.latents.get(made.keys.latent(picture, g))
                for g in picture.geometries
                if g.time_ids() == tuple(drawn.time_ids[sample].tolist())
            ]
            assert any(
                torch.equal(row[:4], drawn.mean[sample]) and torch.equal(row[4:], drawn.std[sample]) for row in rows
            )


def test_captions_are_dropped_as_often_as_asked_and_never_the_same_ones(samples: Callable[..., Samples]) -> None:
    made = samples(data=[{"caption_dropout": 0.3}])
    dropped = np.array(
        [
            [bool((embeds == 0).all()) for embeds in loader.batch(made, epoch, whole(6)).text["prompt_embeds"]]
            for epoch in range(300)
        ]
    )
    assert dropped.mean() == pytest.approx(0.3, abs=0.035)
    assert all(0.15 < share < 0.45 for share in dropped.mean(axis=0))
    pooled = loader.batch(made, int(np.argmax(dropped[:, 0])), whole(1)).text["pooled"]
    assert (pooled == 0).all()


def test_one_of_several_captions_is_drawn(samples: Callable[..., Samples], tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "listed"
    shutil.copytree(Path(samples().pictures[0].record.read.args[0]).parent, folder)
    row = {"file_name": "0.png", "text": ["a red circle", "a blue square", "a green circle"]}
    for other in folder.glob("[1-9]*.png"):
        other.unlink()
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    made = samples(data=[{"path": str(folder)}])
    seen = {loader.batch(made, epoch, whole(1)).text["pooled"].sum().item() for epoch in range(60)}
    assert seen == {made.words.of(Prompt(caption))["pooled"].sum().item() for caption in row["text"]}


def test_weights_of_data_sets_and_of_padding(samples: Callable[..., Samples]) -> None:
    made = samples(data=[{"weight": 0.25}, {"weight": 2.0, "max_samples": 2}])
    assert loader.batch(made, 0, [(0, True), (6, True), (7, False)]).weight.tolist() == [0.25, 2.0, 0.0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_changes_neither_order_nor_content(samples: Callable[..., Samples], workers: int) -> None:
    from sdxl_trainer.data import plan

    made, order = samples(), plan.make(0, 4, [0] * 6)
    read = list(loader.steps(made, order, 3, 9, 2, 0, 1, workers, False))
    assert len(read) == 6
    for step, (epoch, images, batches) in zip(range(3, 9), read, strict=True):
        expected_epoch, chosen = order.step(step)
        assert (epoch, images) == (expected_epoch, len(chosen))
        for batch, part in zip(batches, plan.share(order, chosen, 2, 0, 1), strict=True):
            assert equal(batch, loader.batch(made, epoch, part))
