"""Whole runs: the exact files, the metrics, what is learned and what stays."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer import check, checkpoint, distributed, files, finish
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Start
from sdxl_trainer.train import train

FOLDERS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}


def test_a_run_leaves_exactly_these_files(config: Callable[..., Any], tmp_path: Path) -> None:
    made = config(
        ema={"enabled": True}, validation={"prompts": ["a red circle", "a blue square"], "images": 2, "steps": 2}
    )
    output = train(made)
    records = {
        "config.toml",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "README.md",
        "model_index.json",
        "samples",
    }
    assert {p.name for p in output.iterdir()} == FOLDERS | records | {"unet_raw", "checkpoint-2", "checkpoint-4"}
    kept = {"unet", "unet_ema", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {p.name for p in (output / "checkpoint-4").iterdir()} == kept
    names = {f"step-000004/{prompt}-{image}.png" for prompt in range(2) for image in range(2)}
    assert {str(p.relative_to(output / "samples")) for p in (output / "samples").rglob("*.png")} == names
    noted = [json.loads(line) for line in (output / "samples" / "samples.jsonl").read_text().splitlines()]
    assert {row["file"] for row in noted} == names
    assert {row["weights"] for row in noted} == {"ema"}
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1]
    assert all(row["learning_rate"] == 1e-3 and row["grad_norm"] > 0 for row in rows)


def test_the_result_is_a_pipeline_of_diffusers_with_the_trained_unet(config: Callable[..., Any], base: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    output = train(config())
    pipeline = StableDiffusionXLPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    trained = checkpoint.read_weights(output / "checkpoint-4" / "unet")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in pipeline.unet.state_dict().items())
    before = checkpoint.read_weights(base / "unet")
    moved = [name for name in trained if not torch.equal(trained[name], before[name])]
    assert len(moved) > 0.9 * len(trained)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        was, now = checkpoint.read_weights(base / part), checkpoint.read_weights(output / part)
        assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    assert pipeline("a red circle", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained:FutureWarning")  # EMAModel's own call
def test_averaged_and_raw_weights_are_both_kept(config: Callable[..., Any]) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    output = train(config(ema={"enabled": True}))
    raw, averaged = (checkpoint.read_weights(output / name) for name in ("unet_raw", "unet"))
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    saved = checkpoint.read_weights(output / "checkpoint-4" / "unet_ema")
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    loaded = EMAModel.from_pretrained(output / "checkpoint-4" / "unet_ema", UNet2DConditionModel)
    assert loaded.optimization_step == 4
    # What is loaded for drawing has the settings of a model alone, of which diffusers does not complain.
    settings = json.loads((output / "unet" / "config.json").read_text())
    assert settings.keys() == json.loads((output / "unet_raw" / "config.json").read_text()).keys()


def test_a_single_file_trains_as_the_folder_it_was_packed_from(
    config: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    from sdxl_trainer.formats import single_file

    path = tmp_path / "model.safetensors"
    single_file.pack(base, path)
    model = {"path": str(path), "configs": str(base)}
    packed = train(config(model=model, train={"steps": 2}, output_dir=str(tmp_path / "packed")))
    folder = train(config(train={"steps": 2}))
    one, two = ([row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in (packed, folder))
    assert one == pytest.approx(two, rel=1e-6)


def test_only_what_the_rules_name_learns(config: Callable[..., Any], base: Path) -> None:
    output = train(config(learn=[{"match": r"unet\..*attn2.*"}], train={"steps": 2}))
    before, after = (checkpoint.read_weights(folder) for folder in (base / "unet", output / "unet"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("attn2" in name for name in moved)


def test_v_prediction_with_zero_terminal_snr_is_saved_with_its_scheduler(config: Callable[..., Any]) -> None:
    from diffusers import DDPMScheduler

    objective = {"prediction": "v_prediction", "zero_terminal_snr": True, "snr_gamma": 5.0}
    output = train(config(objective=objective, train={"steps": 1}))
    saved = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
    assert saved["rescale_betas_zero_snr"] is True
    assert saved["timestep_spacing"] == "trailing"
    assert DDPMScheduler.from_pretrained(output / "scheduler").alphas_cumprod[-1] == 0.0


def test_micro_batches_do_not_change_the_result(config: Callable[..., Any], tmp_path: Path) -> None:
    """Batch 4 = 2 x 2 = 4 x 1; six pictures, so that each epoch also ends in a smaller batch."""
    losses = []
    for micro in (4, 2, 1, 3):
        # AdamW's first steps divide each gradient by its own size: at a high rate they blow up rounding.
        sizes = {"batch_size": 4, "micro_batch": micro, "steps": 5, "learning_rate": 1e-4}
        output = train(config(train=sizes, output_dir=str(tmp_path / f"micro{micro}")))
        losses.append([row["loss"] for row in read_metrics(output / "metrics.jsonl")])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    "train_options",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"weights": "bf16"},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0},
        {"workers": 0},
    ],
    ids=str,
)
def test_every_way_to_compute_trains(config: Callable[..., Any], capfd: Any, train_options: dict[str, Any]) -> None:
    output = train(config(train={"steps": 2, **train_options}))
    losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
    assert len(losses) == 2
    assert all(0.3 < loss < 3 for loss in losses)
    from sdxl_trainer import distributed

    wanted = train_options.get("precision", train_options.get("weights", "fp32"))
    cannot = wanted == "fp16" or (wanted == "bf16" and not distributed._cpu_has_bf16())
    assert ("the nearest it can do" in capfd.readouterr().err) == cannot


def test_weights_in_bf16_computed_in_fp32_give_nearly_the_same_loss(config: Callable[..., Any], tmp_path: Path) -> None:
    """And only the weights are rounded: the loss differs by that alone."""
    narrow = train(config(train={"steps": 1, "weights": "bf16"}, output_dir=str(tmp_path / "bf16")))
    full = train(config(train={"steps": 1}))
    losses = [read_metrics(output / "metrics.jsonl")[0]["loss"] for output in (narrow, full)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    saved = checkpoint.read_weights(narrow / "unet")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "muon"])
def test_every_optimizer_lowers_the_loss_of_the_same_sample(config: Callable[..., Any], name: str) -> None:
    """One picture, noise drawn anew: the loss of the last steps is below that of the first."""
    sizes = {"steps": 30, "batch_size": 2, "learning_rate": 2e-3, "checkpoint_every": 0}
    output = train(config(optimizer={"name": name}, train=sizes, data=[{"max_samples": 2}]))
    losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_checkpointing_in_the_backward_pass_changes_nothing(config: Callable[..., Any], tmp_path: Path) -> None:
    outputs = [
        train(config(train={"gradient_checkpointing": on}, output_dir=str(tmp_path / str(on)))) for on in (False, True)
    ]
    one, two = ([row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in outputs)
    assert one == pytest.approx(two, rel=1e-6)


_NARROW = {"weights": "bf16"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"learn": [{"match": ".*"}], "ema": {"enabled": True}},
        {"optimizer": {"name": "adamw_bf16"}, "train": _NARROW, "ema": {"enabled": True}},
        {"optimizer": {"name": "adafactor"}, "train": _NARROW},
    ],
    ids=["unet", "text, ema", "adamw_bf16, ema", "bf16, adafactor"],
)
def test_gradients_freed_in_the_backward_pass_change_no_bit(
    config: Callable[..., Any], tmp_path: Path, more: dict[str, Any]
) -> None:
    """Clipping that has an effect at each step, and adamw, whose kernel clips: weights, losses and norms."""
    options = {"steps": 3, "max_grad_norm": 0.1, "learning_rate": 1e-3, "gradient_checkpointing": True}
    options, more = options | more.get("train", {}), {k: v for k, v in more.items() if k != "train"}
    found = []
    for on in (False, True):
        chosen = config(train={**options, "fused_backward": on}, output_dir=str(tmp_path / str(on)), **more)
        rows = read_metrics((output := train(chosen)) / "metrics.jsonl")
        weights = {path.relative_to(output): load_file(path) for path in output.rglob("*.safetensors")}
        found.append(([(row["loss"], row["grad_norm"]) for row in rows], weights))
    (one, kept), (two, freed) = found
    assert one == two
    assert min(norm for _, norm in one) > 0.1
    assert kept.keys() == freed.keys()
    assert all(torch.equal(kept[path][name], freed[path][name]) for path in kept for name in kept[path])


def test_freed_gradients_need_steps_of_one_pass(config: Callable[..., Any]) -> None:
    """Several processes average gradients; pictures of several sizes meet in an epoch's last steps, a pass for each."""
    one, two = (config(train={"fused_backward": True, "batch_size": size}) for size in (1, 2))
    assert distributed.one_pass(one, 1, 3)
    assert distributed.one_pass(two, 1, 1)
    with pytest.raises(UserError, match="fused_backward on 2 processes"):
        distributed.one_pass(two, 2, 1)
    with pytest.raises(UserError, match="pictures of 3 sizes"):
        distributed.one_pass(two, 1, 3)
    assert not distributed.one_pass(config(train={"batch_size": 2}), 1, 3)


def test_freed_gradients_refuse_buckets_before_anything_is_encoded(config: Callable[..., Any]) -> None:
    sizes = {
        "data": [{"buckets": "area", "bucket_step": 8, "bucket_min": 24}],
        "train": {"fused_backward": True, "batch_size": 2},
    }
    made = config(**sizes)
    for run in (train, check.run):
        with pytest.raises(UserError, match=r"train\.fused_backward with pictures of") as refused:
            run(made)
        assert "batch_size = 1" in refused.value.fix


def test_checkpoints_are_limited(config: Callable[..., Any]) -> None:
    output = train(config(train={"steps": 6, "checkpoints_limit": 2}))
    assert {c.step for c in checkpoint.found(output)} == {4, 6}


def test_checkpoints_are_limited_where_the_last_was_written_just_before_an_interruption(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(train={"steps": 6, "checkpoints_limit": 2})

    def killed(*_: Any) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as killing:
        killing.setattr(checkpoint, "prune", lambda *_: None)
        killing.setattr(finish, "conclude", killed)
        with pytest.raises(SystemExit):
            train(chosen)
    assert {c.step for c in checkpoint.found(Path(chosen.output_dir))} == {2, 4, 6}
    assert {c.step for c in checkpoint.found(train(chosen))} == {4, 6}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    from sdxl_trainer.objective import Objective

    loss, calls = Objective.loss, []

    def poisoned(self: Objective, *tensors: Any) -> torch.Tensor:
        calls.append(1)
        return loss(self, *tensors) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(Objective, "loss", poisoned)
    made = config(optimizer={"name": optimizer}, log={"every": 10})
    with pytest.raises(UserError, match="step 3 is not finite") as caught:
        train(made)
    assert ".png" in caught.value.where
    output = Path(made.output_dir)
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == [1, 2]
    monkeypatch.setattr(Objective, "loss", loss)
    losses = [row["loss"] for row in read_metrics(train(made) / "metrics.jsonl")]
    whole = config(optimizer={"name": optimizer}, output_dir=f"{made.output_dir}-whole")
    assert losses == [row["loss"] for row in read_metrics(train(whole) / "metrics.jsonl")]


def test_already_done_is_said_and_nothing_changes(config: Callable[..., Any], capfd: Any) -> None:
    made = config()
    output = train(made)
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    assert train(made) == output
    assert "already done" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()} == before


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew_in_silence(
    config: Callable[..., Any], tmp_path: Path, capfd: Any
) -> None:
    """Its steps are taken again, which ends as they did."""
    whole = train(config(train={"steps": 2, "checkpoint_every": 0}, output_dir=str(tmp_path / "whole")))
    output = train(config(train={"steps": 1, "checkpoint_every": 0}))
    assert "taken again" not in capfd.readouterr().err
    train(config(train={"steps": 2, "checkpoint_every": 0}))
    assert "ended at step 1 without a checkpoint: its steps are taken again" in capfd.readouterr().err
    assert files.tree_hashes(output / "unet") == files.tree_hashes(whole / "unet")


def test_a_run_killed_after_its_last_step_is_finished_by_the_same_command(config: Callable[..., Any]) -> None:
    """The last checkpoint is there, the pipeline is not: nothing is trained again, everything else is made."""
    import shutil

    made = config(ema={"enabled": True})
    output = train(made)
    whole = checkpoint.read_weights(output / "unet")
    losses = (output / "metrics.jsonl").read_text()
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps({**manifest, "finished": None}))
    shutil.rmtree(output / "unet")
    (output / "model_index.json").unlink()
    train(made)
    again = checkpoint.read_weights(output / "unet")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert (output / "model_index.json").is_file()
    assert (output / "metrics.jsonl").read_text() == losses
    assert json.loads((output / "manifest.json").read_text())["finished"]


def test_fresh_refuses_a_folder_that_holds_a_run(config: Callable[..., Any]) -> None:
    train(config(train={"steps": 1}))
    with pytest.raises(UserError, match="already holds a run"):
        train(config(train={"steps": 1}), Start("new"))


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"learning_rate": 2e-3}},
        {"seed": 1},
        {"data": [{"caption_dropout": 0.5}]},
        {"objective": {"snr_gamma": 5.0}},
    ],
    ids=str,
)
def test_another_run_is_not_continued(config: Callable[..., Any], change: dict[str, Any]) -> None:
    train(config(train={"steps": 2}))
    with pytest.raises(UserError, match="this folder holds a run with"):
        train(config(**change))


def test_what_decides_no_step_may_change(config: Callable[..., Any]) -> None:
    from sdxl_trainer.resume import differences

    old = config(adapter={}).model_dump(mode="json") | {"preset": "lora-character@1"}
    more = {"export": {"formats": ["kohya"], "author": "me"}, "validation": {"prompts": ["a dog"]}, "log": {"every": 3}}
    assert differences(old, config(adapter={}, train={"checkpoint_every": 7}, **more)) == []


def test_options_that_are_newer_than_a_checkpoint_stand_at_their_defaults(config: Callable[..., Any]) -> None:
    from sdxl_trainer.resume import differences

    made = config(optimizer={"name": "lion"})
    old = made.model_dump(mode="json")
    del old["optimizer"]["arguments"], old["optimizer"]["betas"], old["timesteps"], old["objective"]["noise_offset"]
    assert differences(old, made) == []
    changed = config(optimizer={"name": "lion", "arguments": {"maximize": True}}, objective={"noise_offset": 0.1})
    assert {key for key, _, _ in differences(old, changed)} == {
        "optimizer.arguments.maximize",
        "objective.noise_offset",
    }


def test_a_warm_start_imports_nothing_that_only_a_cold_one_needs(config: Callable[..., Any], tmp_path: Path) -> None:
    import subprocess
    import sys

    from sdxl_trainer.configfile import dumps

    train(config(train={"steps": 1}))
    path = tmp_path / "warm.toml"
    path.write_text(dumps(config(output_dir=str(tmp_path / "warm"), train={"steps": 1})))
    code = (
        "import sys; from pathlib import Path; from sdxl_trainer import configfile, train, report, publish;"
        f"train.train(configfile.load(Path({str(path)!r})));"
        "cold = ['datasets', 'diffusers', 'transformers', 'peft', 'torch._dynamo', 'torch.distributed.tensor'];"
        "print([name for name in cold if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
