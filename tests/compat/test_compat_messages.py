"""What the script says of mistakes, interruptions and secrets."""

import os
import sys
from typing import Any

import pytest

from sdxl_trainer.compat.train_text_to_image_sdxl import main, translate
from sdxl_trainer.config import Config
from sdxl_trainer.errors import Interrupted, UserError

BASE = ["--pretrained_model_name_or_path=base", "--dataset_name=pictures", "--report_to=none", "--seed=1"]
RANGE = ("--timestep_bias_strategy=range",)
ERRORS: list[tuple[list[str], str, str]] = [
    (["--dataset_name=d"], "--pretrained_model_name_or_path is missing", "add --pretrained_model_name_or_path"),
    (["--pretrained_model_name_or_path=b"], "no pictures to train on", "--train_data_dir"),
    ([*BASE, "--learning_rat=1", "--seeed=4"], "unknown flag --seeed", "did you mean '--seed'?"),
    ([*BASE, "--use_adam"], "unknown flag --use_adam", "did you mean '--use_"),
    ([*BASE, "extra"], "'extra' belongs to no flag", "--help"),
    ([*BASE, "--lr=1"], "ambiguous option", "--help"),
    ([*BASE, "--center_crop=True"], "--center_crop", "--help"),
    ([*BASE, "--resolution"], "--resolution: expected one argument", "--help"),
    ([*BASE, "--resolution=big"], "--resolution = big is not a whole number", "default: 1024"),
    ([*BASE, "--resolution=0"], "--resolution = 0 is not allowed", "greater than or equal to 8"),
    ([*BASE, "--learning_rate=fast"], "--learning_rate = fast is not a number", "default: 0.0001"),
    ([*BASE, "--learning_rate=nan"], "--learning_rate = NaN", "finite"),
    ([*BASE, "--seed=-1"], "--seed = -1", "greater than or equal to 0"),
    ([*BASE, "--mixed_precision=fp8"], "--mixed_precision = fp8", "allowed: no, fp16, bf16"),
    ([*BASE, "--image_interpolation_mode=lancos"], "lancos is not allowed", "did you mean 'lanczos'?"),
    ([*BASE, "--timestep_bias_strategy=rnge"], "--timestep_bias_strategy = rnge", "did you mean 'range'?"),
    ([*BASE, "--lr_scheduler=cosin"], '--lr_scheduler = "cosin"', "did you mean 'cosine'?"),
    ([*BASE, "--prediction_type=eps"], '--prediction_type = "eps"', "epsilon"),
    ([*BASE, "--proportion_empty_prompts=1.5"], "--proportion_empty_prompts = 1.5", "less than or equal to 1"),
    ([*BASE, "--gradient_accumulation_steps=0"], "--gradient_accumulation_steps = 0", "1 or more"),
    ([*BASE, "--train_batch_size=0"], "--train_batch_size = 0", "greater than 0"),
    ([*BASE, "--dataloader_num_workers=-1"], "--dataloader_num_workers = -1", "greater than or equal to 0"),
    ([*BASE, *RANGE, "--timestep_bias_begin=600", "--timestep_bias_end=500"], "--timestep_bias_begin = 600", "begin"),
    ([*BASE, "--report_to=tensorbord"], "--report_to = tensorbord", "did you mean 'tensorboard'?"),
    ([*BASE, "--report_to=wandb", "--hub_token=x"], "--hub_token with wandb", "hf auth login"),
    ([*BASE, "--max_train_samples=1.5"], "--max_train_samples = 1.5 is not a whole number", "give a whole number"),
    ([*BASE, "--report_to=all", "--hub_token=x"], "--hub_token with wandb", "hf auth login"),
]


@pytest.mark.parametrize(("argv", "what", "fix"), ERRORS)
def test_mistakes_name_the_flag_and_the_fix(argv: list[str], what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        translate(argv, {}, lambda: 1)
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize("flag", ["--prediction_type=x", "--mixed_precision=x", "--lr_scheduler=x"])
def test_what_is_allowed_is_said_once(flag: str) -> None:
    with pytest.raises(UserError) as caught:
        translate([*BASE, flag], {}, lambda: 1)
    assert caught.value.fix.count("allowed: ") == 1


def test_one_mistake_is_not_two() -> None:
    with pytest.raises(UserError) as caught:
        translate([*BASE, "--resolution=0"], {}, lambda: 1)
    assert caught.value.what == "--resolution = 0 is not allowed"


def test_a_mistake_is_three_lines_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--seeed=4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "at", "fix"]


def test_secrets_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--hub_tokens=secret"]) == 2
    assert "secret" not in capsys.readouterr().err


def test_the_token_goes_to_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("sdxl_trainer.train.train", lambda config, start: seen.append(config))
    monkeypatch.setenv("HF_TOKEN", "")
    argv = [*BASE, "--hub_token=secret-1"]
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    assert main() == 0
    assert os.environ["HF_TOKEN"] == "secret-1"
    assert "secret" not in str(sys.argv) + seen[0].model_dump_json()


def test_what_the_run_finds_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pretrained_model_name_or_path=no/such/model", *BASE[1:], "--lr_scheduler=linear"]) == 2
    assert "   at: --pretrained_model_name_or_path\n" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_an_interruption_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    def stopped(config: Config, start: Any) -> None:
        raise Interrupted(number)

    monkeypatch.setattr("sdxl_trainer.train.train", stopped)
    assert main(BASE) == status
    assert "--resume_from_checkpoint=latest" in capsys.readouterr().err


def test_processes_that_cannot_meet_need_a_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main(BASE[:-1]) == 2
    assert "give one with --seed" in capsys.readouterr().err
