"""What a run leaves for other programs: read by them, with the effect of the result, and saying what is true."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import folder, header, lora, single_file
from sdxl_trainer.train import train
from tests.bad_inputs.place import run_here
from tests.train.test_adapters import stock_picture

VALIDATION = {"prompts": ["a red circle"], "images": 1, "steps": 2, "seed": 5}


def told(path: Path) -> dict[str, str]:
    return header.described(path, "")[1]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_adapters_for_other_programs(config: Callable[..., Any], base: Path, tmp_path: Path, kind: str) -> None:
    export = {"formats": ["kohya"], "name": "cat", "trigger": "sks cat", "author": "me"}
    adapter = {"kind": kind, "rank": 4, "alpha": 2.0, "targets": "all"}
    options = config(adapter=adapter, export=export, validation=VALIDATION, train={"steps": 2, "learning_rate": 1e-2})
    train(options)
    run = tmp_path / "run"
    made = lora.read(run / "cat.safetensors")
    assert {module.kind for module in made.modules.values()} == {kind.replace("dora", "lora")}
    assert (run / "cat.preview.png").is_file()
    assert json.loads((run / "cat.json").read_text())["activation text"] == "sks cat"
    if kind in ("lora", "dora"):
        trained = lora.read(run / "pytorch_lora_weights.safetensors")
        assert trained.modules.keys() == made.modules.keys()
        for name, module in trained.modules.items():
            assert module.scale == made.modules[name].scale == 0.5
            assert all(torch.equal(t, made.modules[name].tensors[role]) for role, t in module.tensors.items())
    if kind == "lora":
        (run / "only").mkdir()
        (run / "cat.safetensors").rename(run / "only" / "pytorch_lora_weights.safetensors")
        # The order in which layers are loaded changes nothing but the last bit.
        assert np.abs(stock_picture(base, run) - stock_picture(base, run / "only")).max() <= 1


def test_epochs_are_those_of_the_run(config: Callable[..., Any], tmp_path: Path) -> None:
    """Six pictures, each five times, two a step: an epoch is 15 steps."""
    made = config(adapter={"rank": 2}, data=[{"repeats": 5.0}], train={"steps": 8, "batch_size": 2})
    train(made)
    entries = told(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert (entries["ss_num_epochs"], entries["ss_max_train_steps"]) == ("1", "8")


def test_what_an_adapter_says_of_its_run(config: Callable[..., Any], tmp_path: Path) -> None:
    export = {"formats": ["kohya"], "trigger": "sks", "license": "openrail++", "dtype": "bf16"}
    train(config(adapter={"rank": 4}, export=export, train={"steps": 3}, objective={"snr_gamma": 5.0}, seed=7))
    for name in ("run.safetensors", "pytorch_lora_weights.safetensors"):
        entries = told(tmp_path / "run" / name)
        assert entries["ss_base_model_version"] == "sdxl_base_v1-0"
        assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == ("4", "4")
        assert (entries["ss_seed"], entries["ss_steps"], entries["ss_min_snr_gamma"]) == ("7", "3", "5.0")
        assert entries["modelspec.trigger_phrase"] == "sks"
        assert entries["modelspec.license"] == "openrail++"
        tags = json.loads(entries["ss_tag_frequency"])
        assert tags == {"1_" + next(iter(tags)).removeprefix("1_"): next(iter(tags.values()))}
        assert next(iter(tags.values())) == {
            f"a {c} {s}": 1 for c in ("red", "green", "blue") for s in ("circle", "square")
        }
        assert json.loads(entries["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [64, 64], "count": 6}}}
        assert sum(found["img_count"] for found in json.loads(entries["ss_dataset_dirs"]).values()) == 6
        assert float(entries["ss_training_started_at"]) > 1.7e9
    dtypes = {t.dtype for name, t in load_file(tmp_path / "run/run.safetensors").items() if not name.endswith("alpha")}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("asked", "used"), [({}, "fp32"), ({"precision": "bf16"}, "bf16"), ({"weights": "bf16"}, "bf16")]
)
def test_the_precision_that_was_used_is_told(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], used: str
) -> None:
    """Not the 'auto' of the config, which is another one on another machine."""
    monkeypatch.setattr("sdxl_trainer.distributed._cpu_has_bf16", lambda: True)
    kind: dict[str, Any] = {"optimizer": {"name": "adamw_bf16"}} if "weights" in asked else {"adapter": {"rank": 2}}
    export = {"formats": ["single" if "weights" in asked else "kohya"]}
    train(config(**kind, export=export, train={"steps": 1, "precision": "auto", **asked}))
    assert told(tmp_path / "run/run.safetensors")["ss_mixed_precision"] == used


def test_minimal_metadata_keeps_captions_private(config: Callable[..., Any], tmp_path: Path) -> None:
    train(
        config(
            adapter={"rank": 4},
            export={"formats": ["kohya"], "metadata": "minimal", "trigger": "sks"},
            train={"steps": 1},
        )
    )
    for name in ("run.safetensors", "pytorch_lora_weights.safetensors"):
        content = (tmp_path / "run" / name).read_bytes()
        assert b"circle" not in content
        assert told(tmp_path / "run" / name)["modelspec.trigger_phrase"] == "sks"
        assert told(tmp_path / "run" / name)["ss_base_model_version"] == "sdxl_base_v1-0"


def test_a_whole_model_in_one_file(config: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    objective = {"prediction": "v_prediction", "zero_terminal_snr": True}
    train(config(export={"formats": ["single"], "name": "mine"}, objective=objective, train={"steps": 1}))
    about = single_file.about(tmp_path / "run/mine.safetensors")
    assert (about.v_prediction, about.zero_terminal_snr, about.unused) == (True, True, ())
    assert about.metadata["modelspec.title"] == "mine"
    for part, weights in single_file.read(tmp_path / "run/mine.safetensors").items():
        trained = folder.read_weights(part, tmp_path / "run")
        assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items())


def test_files_that_are_asked_for_too_late_are_written_by_another_command(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    words = [{"name": "<toy>", "init": "circle"}]
    sections = {"adapter": {"rank": 2}, "token": words, "data": [{"caption_prefix": "<toy> "}], "train": {"steps": 1}}
    output = train(config(**sections, export={"formats": ["kohya"]}))
    train(config(**sections, export={"formats": ["kohya"]}))
    assert "ended" not in capfd.readouterr().err
    export = {"formats": ["kohya", "embeddings"], "name": "mine", "dtype": "bf16"}
    train(config(**sections, export=export, hub={"push": True}))
    said = capfd.readouterr().err
    assert "the run had ended when export.formats, export.name, export.dtype changed, and writes no more files" in said
    assert f"the run had ended when hub.push changed: sdxl push {output}" in said
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"sdxl (convert \S+ \S+\.safetensors(?: --dtype bf16)?)", said):
        assert run_here(command.split(), monkeypatch) == 0
    assert {path.name for path in tmp_path.glob("mine*")} == {"mine.safetensors", "mine_emb.safetensors"}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"export": {"formats": ["kohya"]}}, "layout of adapters"),
        ({"export": {"formats": ["single"]}, "adapter": {}}, "an adapter or new words are trained"),
        ({"export": {"name": "a"}}, 'export.name = "a" has no effect'),
        ({"export": {"formats": ["single"], "metadata": "none", "author": "me"}}, "export.metadata is 'none'"),
        ({"export": {"author": "me"}}, 'export.author = "me" has no effect'),
        ({"export": {"formats": ["single"], "name": "a/b"}}, "cannot be the name"),
        ({"export": {"formats": ["kohya"], "name": "pytorch_lora_weights"}, "adapter": {}}, "cannot be the name"),
    ],
)
def test_exports_that_cannot_be(config: Callable[..., Any], sections: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        config(**sections)
