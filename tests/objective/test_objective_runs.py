"""Objectives, noise and timesteps in whole runs: bitwise resume, one result for any micro-batch, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trainer import base as bases
from sdxl_trainer import checkpoint, configfile, setup
from sdxl_trainer.data import loader, prepare
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import folder, single_file
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train

COMBINATIONS: dict[str, dict[str, Any]] = {
    "stratified": {
        "objective": {
            "weighting": "soft_min_snr",
            "snr_gamma": 5.0,
            "loss": "huber",
            "noise_offset": 0.05,
            "noise_offset_random": True,
            "noise_offset_adaptive": 0.1,
            "input_perturbation": 0.1,
        },
        "timesteps": {"density": "logit_normal", "sampling": "stratified", "importance": True},
    },
    "sobol": {
        "objective": {
            "prediction": "v_prediction",
            "zero_terminal_snr": True,
            "weighting": "debiased",
            "loss": "smooth_l1",
            "pyramid_levels": 3,
            "input_perturbation": 0.1,
            "input_perturbation_random": True,
        },
        "timesteps": {"density": "cubic", "sampling": "sobol", "bias": "earlier", "multiplier": 2.0},
    },
}
SIZES = {"steps": 4, "batch_size": 4, "micro_batch": 3, "checkpoint_every": 2}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_runs_are_resumed_bitwise_and_do_not_depend_on_the_micro_batch(
    config: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    options = COMBINATIONS[name]
    whole = train(config(**options, train=SIZES, output_dir=str(tmp_path / "whole")))
    broken = tmp_path / "broken"
    train(config(**options, train={**SIZES, "steps": 2}, output_dir=str(broken)))
    train(config(**options, train=SIZES, output_dir=str(broken)))
    assert losses(broken) == losses(whole)
    one, two = (checkpoint.read_weights(output / "unet") for output in (whole, broken))
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    rates = {"micro_batch": 1, "steps": 2}
    other = train(config(**options, train={**SIZES, **rates}, output_dir=str(tmp_path / "other")))
    assert losses(other) == pytest.approx(losses(whole)[:2], rel=1e-5)


def stepped(made: Any, tmp_path: Path, ranks: int, micro: int) -> list[dict[str, tuple[Any, ...]]]:
    """Of each step, by picture: timestep, weight and noise, from all processes together."""
    found = bases.resolve(made.model, tmp_path)
    stock = prepare.take_stock(made, found, "fp32")
    prepare.fill(made, found, stock, torch.device("cpu"), lambda *_: None, print)
    samples = prepare.samples(made, found, stock, 1000)
    order = prepare.order(made, stock)
    rows: list[dict[str, tuple[Any, ...]]] = []
    for rank in range(ranks):
        steps = loader.steps(samples, order, 0, 4, micro, rank, ranks, 0, pin=False)
        for number, (_, _, batches) in enumerate(steps):
            rows += [{}] if number == len(rows) else []
            for batch in batches:
                for i, name in enumerate(batch.names):
                    if batch.weight[i] > 0:
                        drawn = (batch.timesteps[i].item(), batch.weight[i].item(), batch.noise[i].sum().item())
                        rows[number][name] = drawn
    return rows


@pytest.mark.parametrize("name", COMBINATIONS)
def test_timesteps_are_spread_over_the_steps_of_all_processes(
    config: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    made = config(**COMBINATIONS[name], train=SIZES)
    alone = stepped(made, tmp_path, 1, 4)
    assert stepped(made, tmp_path, 2, 1) == alone
    assert stepped(made, tmp_path, 3, 2) == alone
    if name == "stratified":
        samples = prepare.samples(made, *_stock(made, tmp_path), 1000)
        cumulative = [0.0, *samples.clock.cumulative]
        for step in alone:
            middles = [(cumulative[t] + cumulative[t + 1]) / 2 for t, _, _ in step.values()]
            assert sorted(int(u * len(step)) for u in middles) == list(range(len(step)))


def _stock(made: Any, tmp_path: Path) -> tuple[Any, Any]:
    found = bases.resolve(made.model, tmp_path)
    return found, prepare.take_stock(made, found, "fp32")


def test_a_perturbed_input_leaves_the_target_bitwise_alone(config: Callable[..., Any], tmp_path: Path) -> None:
    batches = []
    for strength in (0.0, 0.1):
        made = config(objective={"input_perturbation": strength})
        found, stock = _stock(made, tmp_path)
        prepare.fill(made, found, stock, torch.device("cpu"), lambda *_: None, print)
        batches.append(loader.batch(prepare.samples(made, found, stock, 1000), 0, [(0, True), (2, True)]))
    plain, perturbed = batches
    assert torch.equal(plain.noise, perturbed.noise)
    assert plain.seen_noise is plain.noise
    assert torch.equal(perturbed.seen_noise, plain.noise + perturbed.perturbation)
    assert (perturbed.seen_noise - plain.noise).std().item() == pytest.approx(0.1, rel=0.2)
    moved = perturbed.to(torch.device("cpu"), torch.float32)
    assert torch.equal(moved.perturbation, perturbed.perturbation)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"objective": {"p2_gamma": 0.5}}, "p2_gamma = 0.5 has no effect"),
        ({"objective": {"weighting": "p2", "snr_gamma": 5.0}}, "snr_gamma = 5.0 has no effect"),
        ({"objective": {"weighting": "min_snr"}}, "without snr_gamma"),
        ({"objective": {"delta": 0.5}}, "delta = 0.5 has no effect"),
        ({"objective": {"delta_schedule": "constant"}}, "delta_schedule = .* has no effect"),
        ({"objective": {"loss": "huber", "delta": 1.5}}, "goes from 1 down to it"),
        ({"objective": {"noise_offset_random": True}}, "noise_offset_random = true has no effect"),
        ({"objective": {"noise_offset_adaptive": 0.1}}, "noise_offset_adaptive = 0.1 has no effect"),
        ({"objective": {"pyramid_discount": 0.5}}, "pyramid_discount = 0.5 has no effect"),
        ({"objective": {"pyramid_levels": 1}}, "pyramid_levels = 1 has no effect"),
        ({"objective": {"input_perturbation_random": True}}, "input_perturbation_random = true has no effect"),
        ({"timesteps": {"location": 1.0}}, "location = 1.0 has no effect"),
        ({"timesteps": {"density": "beta", "slope": 1.0}}, "slope = 1.0 has no effect"),
        ({"timesteps": {"density": "sigmoid", "alpha": 1.0}}, "alpha = 1.0 has no effect"),
        ({"timesteps": {"density": "sigmoid", "slope": 0.0}}, "uniform"),
        ({"timesteps": {"importance": True}}, "importance = true has no effect"),
        ({"timesteps": {"sampling": "stratified"}, "train": {"batch_size": 1}}, "sampling = .* has no effect"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(tree: Callable[..., Any], changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        configfile.validated(tree(**changes), "test.toml")


EDM = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}


@pytest.fixture
def edm(base: Path, tmp_path: Path) -> Path:
    """The tiny base with a scheduler of EDM, as Playground 2.5 has one."""
    import json
    import shutil

    folder = tmp_path / "edm"
    shutil.copytree(base, folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(EDM))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_base_of_edm_trains_draws_and_is_saved_with_its_scheduler(config: Callable[..., Any], edm: Path) -> None:
    from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline

    validation = {"prompts": ["a red circle"], "images": 1, "steps": 2}
    output = train(config(model={"path": str(edm)}, train={"steps": 2}, validation=validation))
    assert len(list((output / "samples").rglob("*.png"))) == 1
    pipeline = StableDiffusionXLPipeline.from_pretrained(output)
    assert isinstance(pipeline.scheduler, EDMEulerScheduler)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.scheduler.config.sigma_data == 0.5


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        ({"snr_gamma": 5.0}, "min_snr with a base of EDM"),
        ({"weighting": "epsilon"}, "epsilon with a base of EDM"),
        ({"prediction": "sample"}, "prediction 'sample' with a base of EDM"),
        ({"zero_terminal_snr": True}, "no effect on a base of EDM"),
    ],
)
def test_what_has_no_meaning_for_edm_is_refused(
    config: Callable[..., Any], edm: Path, tmp_path: Path, objective: dict[str, Any], what: str
) -> None:
    made = config(model={"path": str(edm)}, objective=objective)
    with pytest.raises(UserError, match=what):
        setup.noise_schedule(made, bases.resolve(made.model, tmp_path))


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_weighting_that_undoes_zero_terminal_snr_is_told(
    config: Callable[..., Any], capsys: pytest.CaptureFixture[str], gamma: float | None
) -> None:
    objective = {"prediction": "v_prediction", "zero_terminal_snr": True, "snr_gamma": gamma}
    train(config(objective=objective, train={"steps": 1, "checkpoint_every": 0}))
    said = "weighted by min_snr the last timestep, where drawing begins, counts for nothing"
    assert (said in capsys.readouterr().err) == (gamma is not None)


def test_what_one_file_cannot_say_is_not_written_as_one(config: Callable[..., Any], edm: Path, tmp_path: Path) -> None:
    """Its readers would take the model for one that predicts the noise of SDXL's own schedule."""
    one = {"export": {"formats": ["single"]}, "train": {"steps": 1, "checkpoint_every": 0}}
    with pytest.raises(UserError, match="cannot say that a model has EDM's noise levels"):
        train(config(model={"path": str(edm)}, **one))
    with pytest.raises(UserError, match="cannot say that a model predicts the picture itself"):
        train(config(objective={"prediction": "sample"}, **one))
    with pytest.raises(UserError, match="one file cannot say that a model has EDM's noise levels"):
        single_file.pack(edm, tmp_path / "one.safetensors")


@pytest.mark.parametrize("mark", single_file.EDM)
def test_one_file_of_edm_is_not_taken_for_another_model(base: Path, tmp_path: Path, mark: str) -> None:
    parts = {name: folder.read_weights(name, base) for name in folder.WEIGHTS}
    save_file(
        load_file(single_file.write(tmp_path / "a.safetensors", parts, {})) | {mark: torch.zeros(4)}, tmp_path / "b"
    )
    with pytest.raises(UserError, match="EDM's noise levels"):
        single_file.expand(tmp_path / "b", tmp_path / "out", configs=base)
