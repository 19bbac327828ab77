"""The validation loss: of pictures that are never trained, moved by nothing but the weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import checkpoint
from sdxl_trainer.config import Optimizer
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.conftest import draw_folder

SETS = {"held_out": 0.4, "buckets": "area", "bucket_step": 16, "bucket_min": 32, "flip": True, "caption_dropout": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "ten"
    path.mkdir()
    return draw_folder(path, [(64 + 7 * index, 100) for index in range(10)])


def measures(output: Path) -> dict[int, float]:
    rows = read_metrics(output / "metrics.jsonl")
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_the_loss_of_held_out_pictures_depends_on_weights_alone(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    def run(name: str, rate: float, **more: Any) -> Path:
        options = {"learning_rate": rate, "checkpoint_every": 0, "batch_size": 3}
        sections = {"validation": {"loss_every": 2, "loss_timesteps": 3}, "train": options, **more}
        return train(config(data=[{"path": str(folder), **SETS}], output_dir=str(tmp_path / name), **sections))

    still = measures(run("still", 1e-30))
    assert list(still) == [2, 4]
    assert still[2] == still[4]
    seed = measures(run("seed", 1e-30, seed=5))
    assert seed == still, "another seed, another order of training, the same pictures, timesteps and noise"
    moved = measures(run("moved", 1e-3))
    assert moved[2] != moved[4]
    assert 0.3 < still[2] < 3


def test_measuring_changes_neither_training_nor_what_is_trained(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    outputs = []
    for name, validation in (("with", {"loss_every": 1}), ("without", {})):
        data = [{"path": str(folder), **SETS}]
        outputs.append(train(config(data=data, validation=validation, output_dir=str(tmp_path / name))))
    rows = [read_metrics(output / "metrics.jsonl") for output in outputs]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    one, two = (checkpoint.read_weights(output / "unet") for output in outputs)
    assert all(bool((one[name] == two[name]).all()) for name in one)
    manifest = json.loads((outputs[0] / "manifest.json").read_text())
    assert manifest["data"]["pictures"] < 10


def rows(output: Path) -> list[dict[str, Any]]:
    return read_metrics(output / "validation.jsonl")


def test_batches_and_the_processes_do_not_matter(config: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    """Bitwise: every picture is measured by itself."""
    found = []
    for name, train_options in (("one", {"batch_size": 4}), ("two", {"batch_size": 4, "micro_batch": 1})):
        options = {"learning_rate": 1e-30, "checkpoint_every": 0, "steps": 1, **train_options}
        sections = {
            "validation": {"loss_every": 1, "trained_pictures": 2},
            "train": options,
            "output_dir": str(tmp_path / name),
        }
        found.append(rows(train(config(data=[{"path": str(folder), **SETS}], **sections))))
    assert found[0] == found[1]
    assert [(row["step"], row["set"]) for row in found[0]] == [(s, n) for s in (0, 1) for n in ("held_out", "trained")]
    for row in found[0]:
        assert row["loss"] == pytest.approx(math.prod(row["pictures"]) ** (1 / len(row["pictures"])), rel=1e-5)
        assert row["loss"] == pytest.approx(math.prod(row["by_timestep"]) ** (1 / 4), rel=1e-6)
        assert row["timesteps"] == [125, 375, 625, 875]


def test_the_loss_is_that_of_the_formula(config: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    """|| model(alpha x + sigma noise, t) - noise ||^2 by diffusers alone, with the draws of the picture; the training
    loss's own weighting, shape and noise have no part in it."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from sdxl_trainer import held_out

    kept: dict[str, Any] = {}
    original = held_out.fixed

    def spy(*arguments: Any) -> Any:
        kept[arguments[0].pictures[arguments[1]].name] = original(*arguments)
        return kept[arguments[0].pictures[arguments[1]].name]

    held_out.fixed = spy
    try:
        objective = {"snr_gamma": 1.0, "loss": "huber", "noise_offset": 0.5}
        options = {"learning_rate": 1e-30, "steps": 1, "checkpoint_every": 0}
        validation = {"loss_every": 1, "trained_pictures": 3}
        made = config(data=[{"path": str(folder), **SETS}], objective=objective, train=options, validation=validation)
        output = train(made)
    finally:
        held_out.fixed = original
    unet = UNet2DConditionModel.from_pretrained(output / "unet")
    scheduler = DDPMScheduler.from_pretrained(output / "scheduler")
    means = []
    for batch in kept.values():
        assert [0 <= int(t) - 250 * part < 250 for part, t in enumerate(batch.timesteps)] == [True] * 4
        latents = batch.mean.float() * 0.13025
        noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
        conditions = {"text_embeds": batch.text["pooled"], "time_ids": batch.time_ids}
        with torch.no_grad():
            said = unet(noisy, batch.timesteps, batch.text["prompt_embeds"], added_cond_kwargs=conditions).sample
        means.append(float((said - batch.noise).square().mean((1, 2, 3)).log().mean().exp()))
    told = [loss for row in rows(output)[-2:] for loss in row["pictures"]]
    assert sorted(told) == pytest.approx(sorted(means), rel=1e-4)
    assert len(told) >= 4


def test_the_gain_by_captions_is_what_leaving_them_out_costs(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    """Without them the loss is that of a folder whose captions are empty, and of a model that does not mind."""

    def run(name: str, captions: bool = True, **text: Any) -> Path:
        data = {"path": str(folder), **SETS} | ({} if captions else {"caption": "", "caption_only": True})
        options = {"learning_rate": 1e-30, "steps": 1, "checkpoint_every": 0}
        validation = {"loss_every": 1, "trained_pictures": 2, "caption_gain": True}
        return train(config(data=[data], train=options, validation=validation, output_dir=str(tmp_path / name), **text))

    told = run("told")
    last = read_metrics(told / "metrics.jsonl")[-1]
    assert last["validation_loss"] != last["uncaptioned_loss"]
    assert last["caption_gain"] == 1 - last["validation_loss"] / last["uncaptioned_loss"]
    sets = [row["set"] for row in rows(told)]
    assert sets == ["held_out", "uncaptioned", "trained"] * 2
    empty = read_metrics(run("empty", captions=False, text={"dropped_caption": "empty"}) / "metrics.jsonl")[-1]
    assert empty["caption_gain"] == 0
    without = read_metrics(run("without", text={"dropped_caption": "empty"}) / "metrics.jsonl")[-1]
    assert without["uncaptioned_loss"] == empty["validation_loss"]


def test_averaged_and_last_weights_are_both_measured(config: Callable[..., Any], tmp_path: Path, folder: Path) -> None:
    validation = {"loss_every": 2, "trained_pictures": 3}
    output = train(config(data=[{"path": str(folder), **SETS}], ema={"enabled": True}, validation=validation))
    last = read_metrics(output / "metrics.jsonl")[-1]
    found = {(row["set"], row["weights"]): row["loss"] for row in rows(output) if row["step"] == 4}
    assert last["validation_loss"] == found["held_out", "ema"] != found["held_out", "raw"]
    assert last["validation_loss_raw"] == found["held_out", "raw"]
    assert last["trained_loss"] == found["trained", "ema"]
    assert list(last["validation_loss_at"]) == ["125", "375", "625", "875"]
    assert all(len(row["pictures"]) == 3 for row in rows(output) if row["set"] == "trained")


def test_means_are_geometric_and_the_interval_is_student_s() -> None:
    import torch

    from sdxl_trainer.held_out import Measure
    from sdxl_trainer.intervals import quantile

    assert [round(quantile(n), 3) for n in (1, 4, 5, 9, 30, 1000)] == [12.706, 2.776, 2.571, 2.262, 2.042, 1.962]
    measure = Measure(torch.tensor([[1.0, 4.0], [4.0, 16.0], [2.0, 8.0]]))
    assert measure.pictures == pytest.approx([2.0, 8.0, 4.0])
    assert measure.mean == pytest.approx(4.0)
    assert measure.by_timestep == pytest.approx([2.0, 8.0])
    assert measure.interval == pytest.approx(4.0 * 4.303 * math.log(2) / 3**0.5, rel=1e-4)
    assert Measure(torch.ones(1, 4)).interval is None
    of_another_prediction = Measure(measure.losses * torch.tensor([5.0, 0.2]) * 3)
    assert of_another_prediction.mean == pytest.approx(3 * measure.mean)
    masked = [Measure(torch.tensor([[0.0, 0.0], [loss, loss]])).mean for loss in (1.0, 4.0)]
    assert masked[1] == pytest.approx(2 * masked[0]), "a picture that is masked whole changes no order"


@pytest.fixture
def worsening(config: Callable[..., Any], tmp_path: Path, folder: Path) -> Callable[..., Any]:
    """A run that learns far too fast: its validation loss rises after the first steps."""

    def make(name: str, **validation: Any) -> Any:
        options = {"steps": 12, "learning_rate": 0.03, "checkpoint_every": 3, "checkpoints_limit": 1}
        return config(
            data=[{"path": str(folder), **SETS}],
            validation={"loss_every": 1, "trained_pictures": 0, **validation},
            train=options,
            schedule={"name": "constant"},
            output_dir=str(tmp_path / name),
        )

    return make


def lowest(output: Path) -> int:
    return min((loss, step) for step, loss in measures(output).items())[1]


def test_the_best_model_is_kept_and_the_run_ends_early(worsening: Callable[..., Any]) -> None:
    import torch

    whole = train(worsening("whole"))
    best = lowest(whole)
    output = train(worsening("stopped", keep_best=True, stop_after=2))
    steps = list(measures(output))
    assert steps[-1] == lowest(output) + 2 < 12, "two measures without a lower one"
    assert measures(output) == {step: loss for step, loss in measures(whole).items() if step <= steps[-1]}
    assert lowest(output) == best or best > steps[-1]
    kept = output / f"checkpoint-{lowest(output)}"
    assert kept.is_dir(), "pruning leaves it"
    result, then = (checkpoint.read_weights(folder / "unet") for folder in (output, kept))
    assert all(torch.equal(result[name], then[name]) for name in then)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["steps_taken"] == steps[-1]
    before = (output / "metrics.jsonl").read_bytes()
    train(worsening("stopped", keep_best=True, stop_after=2))
    assert (output / "metrics.jsonl").read_bytes() == before, "it is done"


def test_the_best_model_of_an_optimizer_that_shows_other_weights_than_it_trains(
    worsening: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    made = worsening("averaging", keep_best=True, stop_after=2)
    sizes = made.train.model_copy(update={"learning_rate": 0.1})
    output = train(made.model_copy(update={"optimizer": Optimizer(name="schedulefree"), "train": sizes}))
    best = lowest(output)
    assert best < max(measures(output))
    result, then = (checkpoint.read_weights(folder / "unet") for folder in (output, output / f"checkpoint-{best}"))
    assert all(torch.equal(result[name], then[name]) for name in then)


def test_keep_best_that_comes_too_late_is_refused_before_anything_is_trained(
    worsening: Callable[..., Any], tmp_path: Path
) -> None:
    """The checkpoint that would be the result is not there, which was found when all was done."""
    output = train(worsening("late"))
    assert not (output / f"checkpoint-{lowest(output)}").exists()
    longer = worsening("late", keep_best=True)
    longer = longer.model_copy(update={"train": longer.train.model_copy(update={"steps": 14})})
    with pytest.raises(UserError, match=f"lowest after step {lowest(output)}, which has no checkpoint"):
        train(longer)


def test_an_interrupted_run_measures_and_chooses_alike(
    worsening: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(worsening("whole", keep_best=True))
    from sdxl_trainer import train as module

    original, calls = module.train_step, []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("killed")
        return original(*arguments)

    monkeypatch.setattr(module, "train_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(worsening("broken", keep_best=True))
    monkeypatch.setattr(module, "train_step", original)
    resumed = train(worsening("broken", keep_best=True))
    assert rows(resumed) == rows(whole)
    assert (resumed / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        whole / "unet" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_a_data_set_of_its_own_is_measured_and_never_trained(
    config: Callable[..., Any], tmp_path: Path, folder: Path, pictures: Path
) -> None:
    def run(name: str, *sets: dict[str, Any], **validation: int) -> Path:
        options = {"train": {"steps": 2, "batch_size": 3}, "validation": {"loss_every": 2, **validation}}
        return train(config(data=list(sets), output_dir=str(tmp_path / name), **options))

    ours, theirs = {"path": str(pictures), "resolution": 64}, {"path": str(folder), "resolution": 64}
    both = run("both", ours, {**theirs, "held_out": 1})
    alone = run("alone", ours)
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (both, alone)]
    assert losses[0] == losses[1], "what is held out changes nothing of the training"
    rows = [row for row in read_metrics(both / "validation.jsonl") if row["set"] == "held_out"]
    assert [(row["step"], len(row["pictures"])) for row in rows] == [(0, 10), (2, 10)]
    assert "10 pictures, for validation alone" in (both / "report.html").read_text(encoding="utf-8")
    trained = read_metrics(run("theirs", theirs, trained_pictures=10) / "validation.jsonl")
    assert sorted(trained[0]["pictures"]) == sorted(rows[0]["pictures"])
