"""Trainings by the reference's command line: its own tests, the guide's command, and ways to launch it."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer.compat.train_text_to_image_sdxl import main
from tests.compat import hub as standin

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_text_to_image_sdxl.py"
TOKEN = "hf_standin_secret"
# NumPy 2 warns when diffusers' Euler scheduler turns a tensor into an array; diffusers has to change that call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COMMON = """
    --resolution 64 --center_crop --random_flip --train_batch_size 1 --gradient_accumulation_steps 1
    --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0
""".split()


@pytest.fixture
def data(base: Path, pictures: Path) -> list[str]:
    return [f"--pretrained_model_name_or_path={base}", f"--dataset_name={pictures}"]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "checkpoint" in path.name}


def draws(folder: Path, **parts: Any) -> None:
    """The pipeline in the folder makes a picture."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, add_watermarker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a prompt", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_text_to_image_sdxl(data: list[str], tmp_path: Path) -> None:
    assert main([*data, *COMMON, "--max_train_steps=2", f"--output_dir={tmp_path}"]) == 0
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "scheduler" / "scheduler_config.json").is_file()
    assert any((tmp_path / "logs").rglob("events.out.tfevents*"))
    draws(tmp_path)


@pytest.mark.parametrize("ema", [[], ["--use_ema"]], ids=["raw", "ema"])
def test_text_to_image_checkpointing(data: list[str], base: Path, tmp_path: Path, ema: list[str]) -> None:
    from diffusers import UNet2DConditionModel

    argv = [*data, *COMMON, *ema, f"--output_dir={tmp_path}", "--seed=0"]
    assert main([*argv, "--max_train_steps=4", "--checkpointing_steps=2"]) == 0
    draws(tmp_path)
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    draws(base, unet=UNet2DConditionModel.from_pretrained(tmp_path, subfolder="checkpoint-2/unet"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = ["--max_train_steps=2", "--checkpointing_steps=1", "--resume_from_checkpoint=checkpoint-4"]
    assert main([*argv, *again]) == 0
    draws(tmp_path)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-5"}
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_checkpoints_total_limit(data: list[str], tmp_path: Path) -> None:
    argv = [*data, *COMMON, f"--output_dir={tmp_path}", "--seed=0", "--max_train_steps=6"]
    assert main([*argv, "--checkpointing_steps=2", "--checkpoints_total_limit=2"]) == 0
    draws(tmp_path)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}


def test_checkpoints_total_limit_removes_multiple_checkpoints(data: list[str], tmp_path: Path) -> None:
    argv = [*data, *COMMON, f"--output_dir={tmp_path}", "--seed=0", "--checkpointing_steps=2"]
    assert main([*argv, "--max_train_steps=4"]) == 0
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    more = ["--max_train_steps=8", "--resume_from_checkpoint=checkpoint-4", "--checkpoints_total_limit=2"]
    assert main([*argv, *more]) == 0
    draws(tmp_path)
    assert checkpoints(tmp_path) == {"checkpoint-6", "checkpoint-8"}


def test_resuming_changes_nothing_and_starting_anew_replaces(data: list[str], tmp_path: Path) -> None:
    argv = [*data, *COMMON, "--seed=3", "--checkpointing_steps=2", "--report_to=none"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*argv, f"--output_dir={one}", "--max_train_steps=4"]) == 0
    assert main([*argv, f"--output_dir={two}", "--max_train_steps=2"]) == 0
    latest = ["--resume_from_checkpoint=latest"]
    assert main([*argv, f"--output_dir={two}", "--max_train_steps=4", *latest]) == 0
    weights = [(folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in (one, two)]
    assert weights[0] == weights[1]
    assert main([*argv, f"--output_dir={two}", "--max_train_steps=3"]) == 0
    assert steps(two) == [1, 2, 3]


def test_pictures_of_the_run_before_are_not_taken_for_this_ones(data: list[str], tmp_path: Path) -> None:
    """Its card, its report and its copy on the hub show what its own weights draw."""
    drawing = ["--validation_prompt=a dog", "--num_validation_images=1"]
    argv = [*data, *COMMON, f"--output_dir={tmp_path}", "--seed=0", "--checkpointing_steps=2"]
    assert main([*argv, *drawing, "--max_train_steps=4"]) == 0
    assert "Drawn after 4 steps" in (tmp_path / "README.md").read_text()
    again = "--resume_from_checkpoint=checkpoint-2"
    assert main([*argv, "--max_train_steps=3", again]) == 0
    drawn = [json.loads(line)["step"] for line in (tmp_path / "samples/samples.jsonl").read_text().splitlines()]
    assert set(drawn) <= {1, 2}
    assert main([*argv, "--max_train_steps=1"]) == 0
    assert "Drawn after" not in (tmp_path / "README.md").read_text()


def test_latest_without_a_checkpoint_begins(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*data, *COMMON, f"--output_dir={tmp_path}", "--max_train_steps=1", "--resume_from_checkpoint=latest"]
    assert main([*argv, "--report_to=none"]) == 0
    assert "a new run begins" in capsys.readouterr().err
    assert main([*argv[:-1], "--report_to=none", "--resume_from_checkpoint=checkpoint-7"]) == 2
    assert "checkpoint-7" in capsys.readouterr().err


def launch(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """Run a command in a folder; its stderr."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


# As in the guide but for the model, the data, the number of steps, and a resolution that CPUs can bear.
def test_the_guides_command(base: Path, pictures: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    command = f"""
        accelerate launch {SCRIPT}
        --pretrained_model_name_or_path={base} --pretrained_vae_model_name_or_path={base / "vae"}
        --dataset_name={pictures} --enable_xformers_memory_efficient_attention
        --resolution=64 --center_crop --random_flip --proportion_empty_prompts=0.2
        --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing
        --max_train_steps=3 --use_8bit_adam --learning_rate=1e-06 --lr_scheduler=constant --lr_warmup_steps=0
        --mixed_precision=fp16 --report_to=wandb --validation_epochs 5 --checkpointing_steps=2
        --output_dir=sdxl-naruto-model --push_to_hub
    """.split()
    prompt = "--validation_prompt=a cute Sundar Pichai creature"
    with standin.running(TOKEN) as hub:
        environment |= {**hub.environment(), "HF_TOKEN": TOKEN}
        said = launch([sys.executable, "-m", "accelerate.commands.launch", *command[2:], prompt], environment, tmp_path)
    output = tmp_path / "sdxl-naruto-model"
    assert "xformers attention is not to be had here" in said or find_spec("xformers")
    assert "chosen at random" in said
    assert steps(output) == [1, 2, 3]
    assert checkpoints(output) == {"checkpoint-2"}
    draws(output)
    # Six pictures make two optimizer steps an epoch: drawn after the first epoch and at the end.
    assert {path.name for path in (output / "samples").iterdir()} == {"step-000002", "step-000003", "samples.jsonl"}
    assert len(list((output / "samples").glob("step-*/*.png"))) == 8
    assert any((tmp_path / "wandb").glob("offline-run-*/*.wandb")) or any(output.rglob("offline-run-*/*.wandb"))
    arrived = hub.repositories["me/sdxl-naruto-model"]
    assert {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= set(arrived)
    assert not any(name.startswith(("checkpoint", "cache", "logs", "wandb")) for name in arrived)
    assert (
        arrived["unet/diffusion_pytorch_model.safetensors"]
        == (output / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_two_processes_share_a_seed(data: list[str], tmp_path: Path, environment: dict[str, str]) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    argv = [*data, *COMMON, "--max_train_steps=2", "--output_dir=run", "--hub_token=secret-2"]
    said = launch([sys.executable, *run, *argv], environment, tmp_path)
    assert said.count("chosen at random") == 1
    assert "D4 in docs/compat.md" in said
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "batch_size = 2" in config
    assert "micro_batch = 1" in config
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["hardware"]["processes"] == 2
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(b"secret-2" in path.read_bytes() for path in written)


def test_an_upload_that_is_refused_is_known_before_training(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_any")  # and HF_HUB_OFFLINE, as in all tests
    assert main([*data, *COMMON, "--max_train_steps=1", f"--output_dir={tmp_path / 'run'}", "--push_to_hub"]) == 2
    assert "nothing has been trained yet" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
