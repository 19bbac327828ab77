"""Several processes of a run: replicas and shards take the steps of one, and continue each other's checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import distributed, files, inspect_cache, setup, sharding
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.train.processes import launch, rank, written

OPTIONS = {
    "data": [{"crop": "random", "flip": True, "caption_dropout": 0.3, "buckets": "area", "bucket_step": 8}],
    "ema": {"enabled": True},
    "timesteps": {"sampling": "stratified"},
    "learn": [{"match": r"unet\..*"}, {"match": r"text_encoder.*"}],
    "validation": {"prompts": ["a red circle"], "images": 3, "steps": 2},
}
TRAIN = {"steps": 6, "batch_size": 4, "micro_batch": 2, "checkpoint_every": 3, "learning_rate": 1e-5}


def asking_rank(path: str, number: int, processes: int, port: int) -> None:
    """In the second step the last process, which does not lead, leaves wishes in the folder; paused, it goes on. What
    its gradients are is in <name>.<rank>.gradients: how many, how many pieces of memory they lie in, and the numbers of
    both."""
    from sdxl_trainer import optim, train, wishes

    original = train.train_step

    def step(run: Any, state: Any, *more: Any) -> Any:
        if state.step == 1 and number == processes - 1:
            wishes.ask(Path(run.config.output_dir), ["sample", "pause"])
        return original(run, state, *more)

    def rest(seconds: float) -> None:
        folder = Path(path).with_suffix("")
        if number == processes - 1 and wishes.asked_to_pause(folder):
            wishes.ask(folder, ["continue"])

    clip = optim.clip

    def counting(optimizer: Any, learning: list[Any], limit: Any) -> Any:
        places = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in learning}
        found = [len(learning), len(places), sum(p.grad.numel() for p in learning), sum(places.values()) // 4]
        Path(path).with_suffix(f".{number}.gradients").write_text(json.dumps(found))
        return clip(optimizer, learning, limit)

    train.train_step, train.sleep, optim.clip = step, rest, counting
    rank(path, number, processes, port)


def test_a_run_moves_between_one_process_replicas_and_shards(config: Callable[..., Any], tmp_path: Path) -> None:
    """Three steps sharded on two processes, then on one, against six on one and six sharded."""
    runs = {"one": [(6, 1, False)], "moved": [(3, 2, True), (6, 1, False)], "back": [(3, 1, False), (6, 2, True)]}
    for name, parts in runs.items():
        for steps, processes, shard in parts:
            train = {**TRAIN, "steps": steps, "shard": shard}
            made = config(**{**OPTIONS, "train": train, "output_dir": str(tmp_path / name)})
            path = written(made)
            assert launch(path, processes) == [0] * processes
            manifest = json.loads((tmp_path / name / "manifest.json").read_text())
            assert manifest["hardware"]["processes"] == processes
    one = read_metrics(tmp_path / "one" / "metrics.jsonl")
    for name in ("moved", "back"):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one], rel=1e-5)
        assert len(list((tmp_path / name / "samples" / "step-000006").glob("*.png"))) == 3
        names = {"unet", "unet_raw", "text_encoder_2", "checkpoint-3", "checkpoint-6"}
        for folder in names:
            ours, theirs = (files.tree_hashes(tmp_path / run / folder).keys() for run in (name, "one"))
            assert ours == theirs
        for part in ("unet", "checkpoint-6/unet_ema"):
            file = "diffusion_pytorch_model.safetensors"
            weights = [read(tmp_path / run / part / file) for run in (name, "one")]
            apart = torch.cat([(weights[0][key] - weights[1][key]).abs().flatten() for key in weights[1]])
            # AdamW's step is the rate whatever the gradient's size: rounding decides the sign where that is near zero.
            assert float(apart.max()) <= 2 * TRAIN["learning_rate"] * TRAIN["steps"]
            assert float(apart.mean()) < 1e-7
            assert (tmp_path / name / part / "config.json").read_bytes() == (
                tmp_path / "one" / part / "config.json"
            ).read_bytes()


def read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"torch\.compile"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient accumulation"),
    ],
)
def test_engines_that_are_not_ours_are_refused(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.make(config(), "fp32")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "first version of FSDP"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "unet.conv_in"}, "fsdp_ignored_modules"),
        ({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "EVERYTHING"}, "no wrap policy"),
    ],
)
def test_settings_of_fsdp_that_are_refused(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    monkeypatch.setattr(distributed, "_launcher_shards", lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.sharding(config(), print)


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 4}, None], ids=["lora", "full"])
def test_shards_ask_the_base_as_one_process_does(
    config: Callable[..., Any], tmp_path: Path, adapter: dict[str, Any] | None
) -> None:
    """Prior prediction, with samples of which some steps have none on one of the processes."""
    found = []
    for processes in (1, 2):
        made = config(
            data=[{"repeats": 2}, {"prior_prediction": True, "weight": 0.5, "caption_dropout": 0.3}],
            train={**TRAIN, "batch_size": 2, "micro_batch": 1, "checkpoint_every": 0, "shard": processes == 2},
            adapter=adapter,
            output_dir=str(tmp_path / str(processes)),
        )
        assert launch(written(made), processes) == [0] * processes
        found.append(read_metrics(tmp_path / str(processes) / "metrics.jsonl"))
    # Of the base's own samples alone the loss is the difference of two predictions that are nearly equal.
    for name, near, rounding in (("loss", 1e-5, 1e-7), ("grad_norm", 1e-4, 1e-6)):
        one, two = ([row[name] for row in rows] for rows in found)
        assert two == pytest.approx(one, rel=near, abs=rounding)
    assert min(row["loss"] for row in found[0]) < 1e-2, "a step of such samples alone"


@pytest.mark.parametrize("launcher", [False, True])
def test_shards_of_one_process_are_said_to_be_none(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: Any, launcher: bool
) -> None:
    monkeypatch.setattr(distributed, "_launcher_shards", lambda: launcher)
    monkeypatch.setenv("FSDP_VERSION", "2")
    train(config(train={"steps": 1, "shard": not launcher}))
    assert "sharded weights (FSDP): there is one process, which keeps everything" in capfd.readouterr().err


def test_memory_is_not_planned_for_shards(config: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"train\.memory with sharded weights"):
        setup.refuse_sharded(config(train={"memory": "12GB", "shard": True}), "fp32")


def test_settings_of_fsdp_that_are_honoured(config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_launcher_shards", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    said: list[str] = []
    assert distributed.sharding(config(), said.append) == sharding.Sharding()
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Transformer2DModel,ResnetBlock2D")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    found = distributed.sharding(config(), said.append)
    assert found == sharding.Sharding(("Transformer2DModel", "ResnetBlock2D"), None, reshard=False)
    assert said == ["no effect with FSDP 2 here: fsdp_state_dict_type"]
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    monkeypatch.setenv("FSDP_MIN_NUM_PARAMS", "5000")
    assert distributed.sharding(config(), said.append) == sharding.Sharding((), 5000, reshard=False)


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "muon", "prodigy", "came"])
def test_optimizers_that_need_whole_tensors_are_refused(name: str) -> None:
    from sdxl_trainer import optim
    from sdxl_trainer.config import Optimizer

    with pytest.raises(UserError, match=f"{name} needs whole tensors"):
        optim.refuse_sharded(Optimizer(name=name))


def test_all_processes_do_what_is_asked_after_the_same_step(config: Callable[..., Any], tmp_path: Path) -> None:
    path = written(config(**{**OPTIONS, "train": {**TRAIN, "steps": 3, "checkpoint_every": 0}}))
    assert launch(path, 2, asking_rank) == [0, 0]
    run = tmp_path / "run"
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(list((run / "samples" / "step-000002").glob("*.png"))) == 3
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    for number in range(2):
        gradients, pieces, numbers, there = json.loads(path.with_suffix(f".{number}.gradients").read_text())
        assert gradients > 20 * pieces, "they lie in the few buckets that are sent"
        assert numbers == there, "and nowhere else"


def test_two_processes_read_from_a_mirror(config: Callable[..., Any], tmp_path: Path) -> None:
    """It has four of the six pictures: each process encodes one of the others, and all train on all of them."""
    one = config(cache={"path": str(tmp_path / "near")}, output_dir=str(tmp_path / "one"))
    assert launch(written(one), 1) == [0]
    far = {"path": str(tmp_path / "part"), "mirror": f"file://{tmp_path / 'far'}"}
    inspect_cache.run(config(data=[{"max_samples": 4}], cache=far), verify=False, gc=False, push=True)
    two = config(cache={**far, "path": str(tmp_path / "new")}, output_dir=str(tmp_path / "two"))
    assert launch(written(two), 2) == [0, 0]
    assert len(list((tmp_path / "new" / "latents").glob("*.safetensors"))) == 2
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-5)
