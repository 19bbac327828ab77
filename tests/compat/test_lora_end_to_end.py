"""The command lines of the reference's own tests of its LoRA scripts leave the files and keys that those assert."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sdxl_trainer import files
from sdxl_trainer.compat import train_dreambooth_lora_sdxl, train_text_to_image_lora_sdxl
from sdxl_trainer.log import read_metrics
from tests.compat.test_compat_end_to_end import ROOT, checkpoints, launch, steps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COMMON = """
    --resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr
    --lr_scheduler constant --lr_warmup_steps 0 --report_to none
""".split()
TWO = ["--max_train_steps", "2"]
LIMITED = ["--max_train_steps", "6", "--checkpointing_steps=2", "--checkpoints_total_limit=2"]
FILE = "pytorch_lora_weights.safetensors"
TEXT = "--train_text_encoder"
PARTS = ("unet.", "text_encoder.", "text_encoder_2.")


@pytest.fixture
def subject(base: Path, tmp_path: Path) -> list[str]:
    """A folder of two pictures of a subject, and something that is not a picture."""
    folder = tmp_path / "imgs"
    folder.mkdir()
    for number, size in enumerate([(120, 80), (96, 160)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{('png', 'jpg')[number]}")
    (folder / ".cache").mkdir()
    (folder / "notes.md").write_text("of a holiday")
    return [
        f"--pretrained_model_name_or_path={base}",
        *("--instance_data_dir", str(folder), "--instance_prompt", "a red circle"),
    ]


@pytest.fixture
def captioned(base: Path, pictures: Path) -> list[str]:
    return [f"--pretrained_model_name_or_path={base}", f"--dataset_name={pictures}"]


def trained(script: Any, argv: list[str], output: Path) -> dict[str, Any]:
    """What the script leaves: its LoRA's tensors."""
    assert script.main([*argv, f"--output_dir={output}"]) == 0
    return load_file(output / FILE)


def draws(base: Path, output: Path, count: int) -> None:
    """The base's pipeline of stock diffusers takes the LoRA and makes a picture."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base, add_watermarker=False)
    pipeline.load_lora_weights(output)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a prompt", num_inference_steps=count, height=64, width=64).images[0].size == (64, 64)


def assert_keys(tensors: dict[str, Any], text: bool) -> None:
    assert all("lora" in key for key in tensors)
    wanted = PARTS if text else PARTS[:1]
    assert all(key.startswith(wanted) for key in tensors)
    assert {next(part for part in PARTS if key.startswith(part)) for key in tensors} == set(wanted)


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders"])
def test_text_to_image_lora(captioned: list[str], tmp_path: Path, text: bool) -> None:
    tensors = trained(train_text_to_image_lora_sdxl, [*captioned, *COMMON, *TWO, *[TEXT] * text], tmp_path / "run")
    assert_keys(tensors, text)
    assert checkpoints(tmp_path / "run") == set()


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders"])
def test_text_to_image_lora_checkpoints_total_limit(
    captioned: list[str], base: Path, tmp_path: Path, text: bool
) -> None:
    trained(train_text_to_image_lora_sdxl, [*captioned, *COMMON, *LIMITED, *[TEXT] * text], tmp_path / "run")
    draws(base, tmp_path / "run", 1)
    assert checkpoints(tmp_path / "run") == {"checkpoint-4", "checkpoint-6"}
    assert all((tmp_path / "run" / name / FILE).is_file() for name in ("checkpoint-4", "checkpoint-6"))


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders"])
def test_dreambooth_lora(subject: list[str], tmp_path: Path, text: bool) -> None:
    assert_keys(trained(train_dreambooth_lora_sdxl, [*subject, *COMMON, *TWO, *[TEXT] * text], tmp_path / "run"), text)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == [5e-4, 5e-4], "what is recorded is --learning_rate, not the text encoders'"


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders"])
def test_dreambooth_lora_custom_captions(captioned: list[str], tmp_path: Path, text: bool) -> None:
    argv = [*captioned, "--caption_column", "text", "--instance_prompt", "photo", *COMMON, *TWO, *[TEXT] * text]
    assert_keys(trained(train_dreambooth_lora_sdxl, argv, tmp_path / "run"), text)


@pytest.mark.parametrize(("text", "count", "last"), [(False, 1, "6"), (True, 2, "7")], ids=["unet", "text encoders"])
def test_dreambooth_lora_checkpoints_total_limit(
    subject: list[str], base: Path, tmp_path: Path, text: bool, count: int, last: str
) -> None:
    argv = [*subject, *COMMON, *LIMITED, "--max_train_steps", last, *[TEXT] * text]
    trained(train_dreambooth_lora_sdxl, argv, tmp_path / "run")
    draws(base, tmp_path / "run", count)
    assert checkpoints(tmp_path / "run") == {"checkpoint-4", "checkpoint-6"}


def test_dreambooth_lora_with_edm(subject: list[str], tmp_path: Path) -> None:
    """For a base that predicts noise it is the plain loss, since 1/sigma^2 of the picture's error is the noise's."""
    argv = [*subject, *COMMON, *TWO, "--seed=0", "--center_crop"]
    found = trained(train_dreambooth_lora_sdxl, [*argv, "--do_edm_style_training"], tmp_path / "edm")
    assert_keys(found, text=False)
    trained(train_dreambooth_lora_sdxl, argv, tmp_path / "plain")
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("edm", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dreambooth_lora_playground(base: Path, subject: list[str], tmp_path: Path) -> None:
    """A base of EDM, as Playground 2.5 is, with its own statistics of latents; no flag is needed for it."""
    shutil.copytree(base, tmp_path / "playground")
    scheduler = {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    files.write_json(tmp_path / "playground" / "scheduler" / "scheduler_config.json", scheduler)
    config = json.loads((tmp_path / "playground" / "vae" / "config.json").read_text())
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5}
    files.write_json(tmp_path / "playground" / "vae" / "config.json", config | statistics)
    argv = [f"--pretrained_model_name_or_path={tmp_path / 'playground'}", *subject[1:], *COMMON, *TWO]
    for name, flags in (("plain", []), ("edm", ["--do_edm_style_training"])):
        assert_keys(trained(train_dreambooth_lora_sdxl, [*argv, *flags, "--seed=0"], tmp_path / name), text=False)
    first, second = (load_file(tmp_path / name / FILE) for name in ("plain", "edm"))
    assert all((first[key] == second[key]).all() for key in first | second)


CLASS = ["--with_prior_preservation", "--class_prompt=a circle", "--num_class_images=3", "--sample_batch_size=2"]


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_dreambooth_with_prior_preservation_by_each_launcher(
    subject: list[str], base: Path, tmp_path: Path, environment: dict[str, str], launcher: str
) -> None:
    """The class pictures are there before the first step, also where two processes draw them."""
    ways = {
        "accelerate": ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--cpu"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    }
    more = {"accelerate": [TEXT, "--use_dora"], "torchrun": ["--output_kohya_format", "--lora_dropout=0.1"]}
    script = str(ROOT / "scripts" / "train_dreambooth_lora_sdxl.py")
    argv = [*subject, *COMMON, *TWO, *CLASS, *more[launcher], "--class_data_dir=class", "--output_dir=run"]
    said = launch([sys.executable, *ways[launcher], script, *argv], environment, tmp_path / "home")
    run = tmp_path / "home" / "run"
    assert "D26 in docs/compat.md" in said
    assert len(list((tmp_path / "home" / "class").glob("*.png"))) == 3
    assert steps(run) == [1, 2]
    draws(base, run, 1)
    assert (run / "pytorch_lora_weights_kohya.safetensors").is_file() == (launcher == "torchrun")


def test_the_loss_of_each_picture(captioned: list[str], tmp_path: Path) -> None:
    argv = [*captioned, *COMMON, "--train_batch_size=3", "--max_train_steps=2", "--debug_loss"]
    trained(train_text_to_image_lora_sdxl, argv, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sorted(name for row in rows for name, _ in row["pictures"]) == [f"{number}.png" for number in range(6)]
    for row in rows:
        assert sum(loss for _, loss in row["pictures"]) / 3 == pytest.approx(row["loss"], rel=1e-5)
    assert (tmp_path / "run" / "report.html").is_file()


def test_interrupted_and_resumed_it_is_the_same(
    subject: list[str], tmp_path: Path, run_to: Callable[[str, int, list[str]], dict[str, Any]]
) -> None:
    whole = run_to("whole", 4, [])
    run_to("parted", 2, [])
    parted = run_to("parted", 4, ["--resume_from_checkpoint=latest"])
    assert all((whole[key] == parted[key]).all() for key in whole | parted)


@pytest.fixture
def run_to(subject: list[str], tmp_path: Path) -> Callable[[str, int, list[str]], dict[str, Any]]:
    def run(name: str, last: int, more: list[str]) -> dict[str, Any]:
        flags = [*CLASS, TEXT, f"--class_data_dir={tmp_path / 'class'}", "--seed=3", "--checkpointing_steps=2"]
        argv = [*subject, *COMMON, *flags, f"--max_train_steps={last}", *more]
        return trained(train_dreambooth_lora_sdxl, argv, tmp_path / name)

    return run
