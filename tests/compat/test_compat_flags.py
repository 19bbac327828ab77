"""The flags of the reference script: names, types, defaults, choices, and what each does to the config."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer.compat import differences, tables
from sdxl_trainer.compat.command import Job
from sdxl_trainer.compat.flags import Flag, truth
from sdxl_trainer.compat.tables import TEXT_TO_IMAGE as FLAGS
from sdxl_trainer.compat.train_text_to_image_sdxl import SCRIPT, parse, translate
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = ["--pretrained_model_name_or_path=base", "--dataset_name=pictures", "--report_to=none", "--seed=1"]
GUIDE = """
    --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
    --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix
    --dataset_name=lambdalabs/naruto-blip-captions --enable_xformers_memory_efficient_attention
    --resolution=512 --center_crop --random_flip --proportion_empty_prompts=0.2 --train_batch_size=1
    --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam
    --learning_rate=1e-06 --lr_scheduler=constant --lr_warmup_steps=0 --mixed_precision=fp16 --report_to=wandb
    --validation_epochs 5 --checkpointing_steps=5000 --output_dir=sdxl-naruto-model --push_to_hub
""".split()


def job(*argv: str, environment: dict[str, str] | None = None) -> Job:
    return translate([*BASE, *argv], environment or {}, lambda: 77)


def value(config: Config, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("flags", "fixture", "count"),
    [
        (tables.TEXT_TO_IMAGE, "reference_flags", 59),
        (tables.TEXT_TO_IMAGE_LORA, "reference_flags_lora", 55),
        (tables.DREAMBOOTH_LORA, "reference_flags_dreambooth", 72),
        (tables.DREAMBOOTH_LORA_ADVANCED, "reference_flags_advanced", 81),
    ],
)
def test_flags_are_those_of_the_reference(flags: tuple[Flag, ...], fixture: str, count: int) -> None:
    rows = json.loads((ROOT / "tests" / "fixtures" / f"{fixture}.json").read_text())
    kinds = {bool: "flag", truth: "bool"}
    ours = {
        flag.name: {
            "type": kinds.get(flag.type) or flag.type.__name__,
            "default": flag.default,
            "choices": sorted(flag.choices) if flag.choices else None,
            "required": flag.required,
        }
        for flag in flags
    }
    theirs = {
        row["flag"]: {
            "type": row["type"],
            "default": row["default"],
            "choices": sorted(row["choices"]) if row["choices"] else None,
            "required": row["required"],
        }
        for row in rows
    }
    assert len(flags) == len(theirs) == count
    assert ours == theirs


def test_the_guides_command() -> None:
    job = translate([*GUIDE, "--validation_prompt=a cute Sundar Pichai creature"], {}, lambda: 77)
    expected = Config.model_validate_json(
        json.dumps(
            {
                "output_dir": "sdxl-naruto-model",
                "seed": 77,
                "model": {
                    "path": "stabilityai/stable-diffusion-xl-base-1.0",
                    "vae": "madebyollin/sdxl-vae-fp16-fix",
                    "attention": "xformers",
                },
                "data": [
                    {
                        "path": "lambdalabs/naruto-blip-captions",
                        "resolution": 512,
                        "crop": "center",
                        "flip": True,
                        "caption_dropout": 0.2,
                    }
                ],
                "train": {
                    "steps": 10000,
                    "batch_size": 4,
                    "micro_batch": 1,
                    "learning_rate": 1e-6,
                    "precision": "fp16",
                    "gradient_checkpointing": True,
                    "checkpoint_every": 5000,
                },
                "text": {"long_captions": "cut"},
                "optimizer": {"name": "adamw8bit"},
                "validation": {"prompts": ["a cute Sundar Pichai creature"], "every_epochs": 5},
                "log": {"trackers": ["wandb"], "project": "text2image-fine-tune-sdxl"},
                "hub": {"push": True},
            }
        )
    )
    assert job.config == expected
    assert (job.start.mode, job.start.checkpoint, job.start.at_least_one_step) == ("restart", None, False)
    assert [note for note in job.notes if "no effect" in note] == []


def test_defaults_are_those_of_the_reference() -> None:
    config = job().config
    assert config.output_dir == "sdxl-model-finetuned"
    assert (config.data[0].resolution, config.data[0].crop, config.data[0].flip) == (1024, "random", False)
    assert (config.train.epochs, config.train.steps) == (100, None)
    assert (config.train.batch_size, config.train.micro_batch, config.train.learning_rate) == (16, 16, 1e-4)
    assert (config.train.precision, config.train.checkpoint_every) == ("fp32", 500)
    assert (config.optimizer.name, config.optimizer.betas, config.optimizer.eps) == ("adamw", (0.9, 0.999), 1e-8)
    assert (config.validation.prompts, config.validation.steps, config.validation.guidance) == ((), 25, 5.0)


RANGE = ("--timestep_bias_strategy=range",)
PROMPT = ("--validation_prompt=a cat",)
# Flag and value; the config path it sets; what it sets; what else the command line needs for it to matter.
EFFECTS: list[tuple[str, str, Any, tuple[str, ...]]] = [
    ("--pretrained_model_name_or_path=other", "model.path", "other", ()),
    ("--pretrained_vae_model_name_or_path=v", "model.vae", "v", ()),
    ("--revision=r", "model.revision", "r", ()),
    ("--variant=fp16", "model.variant", "fp16", ()),
    ("--dataset_name=d", "data.0.path", "d", ()),
    ("--dataset_config_name=c", "data.0.name", "c", ()),
    ("--train_data_dir=f", "data.0.folder", "f", ()),
    ("--image_column=picture", "data.0.image_column", "picture", ()),
    ("--caption_column=words", "data.0.caption_column", "words", ()),
    ("--max_train_samples=9", "data.0.max_samples", 9, ()),
    ("--proportion_empty_prompts=0.25", "data.0.caption_dropout", 0.25, ()),
    ("--resolution=512", "data.0.resolution", 512, ()),
    ("--center_crop", "data.0.crop", "center", ()),
    ("--random_flip", "data.0.flip", True, ()),
    ("--image_interpolation_mode=bicubic", "data.0.interpolation", "bicubic", ()),
    ("--image_interpolation_mode=nearest_exact", "data.0.interpolation", "nearest", ()),
    ("--cache_dir=c", "cache.datasets_dir", "c", ()),
    ("--dataloader_num_workers=4", "train.workers", 4, ()),
    ("--dataloader_num_workers=0", "train.workers", 0, ()),
    ("--dataloader_num_workers=64", "train.workers", 16, ()),
    ("--validation_prompt=a dog", "validation.prompts", ("a dog",), ()),
    ("--num_validation_images=2", "validation.images", 2, PROMPT),
    ("--num_validation_images=0", "validation.prompts", (), PROMPT),
    ("--validation_epochs=3", "validation.every_epochs", 3, PROMPT),
    ("--output_dir=o", "output_dir", "o", ()),
    ("--seed=5", "seed", 5, ()),
    ("--train_batch_size=2", "train.micro_batch", 2, ()),
    ("--train_batch_size=2", "train.batch_size", 2, ()),
    ("--gradient_accumulation_steps=3", "train.batch_size", 48, ()),
    ("--num_train_epochs=7", "train.epochs", 7, ()),
    ("--max_train_steps=8", "train.steps", 8, ()),
    ("--max_train_steps=8", "train.epochs", None, ("--num_train_epochs=7",)),
    ("--checkpointing_steps=4", "train.checkpoint_every", 4, ()),
    ("--checkpoints_total_limit=2", "train.checkpoints_limit", 2, ()),
    ("--gradient_checkpointing", "train.gradient_checkpointing", True, ()),
    ("--mixed_precision=no", "train.precision", "fp32", ()),
    ("--mixed_precision=fp16", "train.precision", "fp16", ()),
    ("--mixed_precision=bf16", "train.precision", "bf16", ()),
    ("--allow_tf32", "train.tf32", True, ()),
    ("--enable_xformers_memory_efficient_attention", "model.attention", "xformers", ()),
    ("--enable_npu_flash_attention", "model.attention", "npu", ()),
    ("--local_rank=3", "seed", 1, ()),
    ("--learning_rate=1e-5", "train.learning_rate", 1e-5, ()),
    ("--scale_lr", "train.learning_rate", 1e-4 * 16 * 3, ("--gradient_accumulation_steps=3",)),
    ("--lr_scheduler=cosine", "schedule.name", "cosine", ()),
    ("--lr_warmup_steps=10", "schedule.warmup_steps", 10, ("--lr_scheduler=linear",)),
    ("--lr_warmup_steps=10", "schedule.warmup_steps", 0, ()),
    ("--lr_scheduler=cosine", "schedule.warmup_steps", 500, ()),
    ("--use_8bit_adam", "optimizer.name", "adamw8bit", ()),
    ("--adam_beta1=0.8", "optimizer.betas", (0.8, 0.999), ()),
    ("--adam_beta2=0.99", "optimizer.betas", (0.9, 0.99), ()),
    ("--adam_weight_decay=0", "optimizer.weight_decay", 0, ()),
    ("--adam_epsilon=1e-6", "optimizer.eps", 1e-6, ()),
    ("--max_grad_norm=0.5", "train.max_grad_norm", 0.5, ()),
    ("--use_ema", "ema.enabled", True, ()),
    ("--prediction_type=v_prediction", "objective.prediction", "v_prediction", ()),
    ("--snr_gamma=5", "objective.snr_gamma", 5, ()),
    ("--noise_offset=0.05", "objective.noise_offset", 0.05, ()),
    ("--timestep_bias_strategy=later", "timesteps.bias", "later", ()),
    ("--timestep_bias_multiplier=2", "timesteps.multiplier", 2, RANGE),
    ("--timestep_bias_multiplier=2", "timesteps.multiplier", 1, ()),
    ("--timestep_bias_begin=200", "timesteps.begin", 200, RANGE),
    ("--timestep_bias_end=500", "timesteps.end", 500, RANGE),
    ("--timestep_bias_portion=0.5", "timesteps.portion", 0.5, ("--timestep_bias_strategy=earlier",)),
    ("--logging_dir=l", "log.dir", "l", ()),
    ("--report_to=tensorboard", "log.trackers", ("tensorboard",), ()),
    ("--report_to=tensorboard,wandb", "log.trackers", ("tensorboard", "wandb"), ()),
    ("--report_to=none", "log.trackers", (), ()),
    ("--push_to_hub", "hub.push", True, ()),
    ("--hub_model_id=me/mine", "hub.id", "me/mine", ("--push_to_hub",)),
    ("--hub_model_id=me/mine", "hub.id", None, ()),
]


@pytest.mark.parametrize(("flag", "path", "expected", "more"), EFFECTS)
def test_each_flag_sets_what_it_says(flag: str, path: str, expected: Any, more: tuple[str, ...]) -> None:
    assert value(job(*more, flag).config, path) == expected


def test_every_flag_has_an_effect_tested_here() -> None:
    elsewhere = {"--resume_from_checkpoint", "--hub_token"}  # the two that set no part of the config
    assert {flag.name for flag in FLAGS} - {row[0].partition("=")[0] for row in EFFECTS} == elsewhere


def test_two_words_and_abbreviations_work_as_in_argparse() -> None:
    assert job("--resolution", "64").config.data[0].resolution == 64
    assert job("--max_train_st=3").config.train.steps == 3


def test_a_folder_alone_is_the_data() -> None:
    argv = ["--pretrained_model_name_or_path=base", "--train_data_dir=photos", "--report_to=none", "--seed=1"]
    data = translate(argv, {}, lambda: 0).config.data[0]
    assert (data.path, data.folder) == ("photos", None)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_the_number_of_processes_is_the_launchers(name: str) -> None:
    argv = ("--train_batch_size=2", "--gradient_accumulation_steps=3", "--scale_lr", "--learning_rate=0.001")
    config = job(*argv, environment={name: "4"}).config
    assert (config.train.batch_size, config.train.micro_batch) == (24, 2)
    assert config.train.learning_rate == pytest.approx(0.024)


@pytest.mark.parametrize(("asked", "precision"), [("no", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp8", "bf16")])
def test_precision_is_accelerates_unless_given(asked: str, precision: str) -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": asked}
    assert job(environment=environment).config.train.precision == precision
    assert job("--mixed_precision=no", environment=environment).config.train.precision == "fp32"


def test_all_trackers_are_those_that_are_installed() -> None:
    assert set(job("--report_to=all").config.log.trackers) >= {"tensorboard", "wandb"}


def test_a_missing_tracker_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "sdxl_trainer.compat.steps.find_spec"
    monkeypatch.setattr(module, lambda name: None)
    left = job("--report_to=tensorboard")
    assert left.config.log.trackers == ()
    assert any("tensorboard is not installed" in note for note in left.notes)
    with pytest.raises(UserError, match="wandb is not installed"):
        job("--report_to=wandb")


@pytest.mark.parametrize("given", ["latest", "checkpoint-4", "/runs/one/checkpoint-4"])
def test_resuming(given: str) -> None:
    start = job(f"--resume_from_checkpoint={given}").start
    assert (start.mode, start.checkpoint, start.at_least_one_step) == ("checkpoint", given, True)


def test_a_checkpoint_that_moved_is_found_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    moved = job(f"--output_dir={tmp_path}", "--resume_from_checkpoint=/gone/checkpoint-4")
    assert moved.start.checkpoint == "checkpoint-4"
    assert any(f"resuming from {tmp_path / 'checkpoint-4'}" in note for note in moved.notes)


def test_a_seed_is_chosen_and_said(tmp_path: Path) -> None:
    argv = [*BASE[:-1], f"--output_dir={tmp_path}"]
    chosen = translate(argv, {}, lambda: 77)
    assert chosen.config.seed == 77
    assert any("--seed=77, chosen at random" in note for note in chosen.notes)
    assert translate([*argv, "--seed=3"], {}, lambda: 77).config.seed == 3


def test_resuming_without_a_seed_takes_that_of_the_run(tmp_path: Path) -> None:
    argv = [*BASE[:-1], f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest"]
    assert translate(argv, {}, lambda: 77).config.seed == 77
    (tmp_path / "config.toml").write_text("seed = 12\n")
    assert translate(argv, {}, lambda: 77).config.seed == 12
    assert translate(argv[:-1], {}, lambda: 77).config.seed == 77


NOTES: list[tuple[tuple[str, ...], str]] = [
    (("--lr_warmup_steps=10",), "--lr_warmup_steps has no effect: --lr_scheduler is 'constant'"),
    (("--lr_warmup_steps=500",), "--lr_warmup_steps has no effect"),
    (("--timestep_bias_multiplier=2",), "--timestep_bias_multiplier has no effect: --timestep_bias_strategy is 'none'"),
    (("--max_train_steps=3", "--num_train_epochs=2"), "--num_train_epochs has no effect: --max_train_steps decides"),
    (("--hub_model_id=me/mine",), "--hub_model_id has no effect"),
    (("--validation_epochs=2",), "--validation_epochs has no effect: --validation_prompt is empty"),
    (("--image_interpolation_mode=nearest_exact",), "is nearest"),
    (("--scale_lr",), "the learning rate is 0.0016"),
    (("--validation_prompt=a", "--num_validation_images=0"), "no validation pictures"),
]


@pytest.mark.parametrize(("argv", "note"), NOTES)
def test_what_does_nothing_is_said(argv: tuple[str, ...], note: str) -> None:
    assert any(note in line for line in job(*argv).notes)


def test_nothing_is_said_where_nothing_differs() -> None:
    assert job("--center_crop").notes == ()


# A command line on which each difference shows.
SHOWN: dict[str, tuple[str, ...]] = {
    "D1": (),
    "D4": (),
    "D7": ("--proportion_empty_prompts=0.1",),
    "D8": ("--random_flip",),
    "D9": ("--lr_scheduler=cosine", "--gradient_accumulation_steps=2"),
    "D10": ("--resume_from_checkpoint=latest",),
    "D13": ("--prediction_type=sample",),
    "D14": ("--timestep_bias_strategy=range", "--timestep_bias_end=500"),
    "D18": ("--mixed_precision=bf16",),
    "D19": ("--validation_prompt=a cat",),
    "D31": ("--caption_column=caption",),
    "D32": ("--use_ema",),
    "D35": ("--pretrained_vae_model_name_or_path=v", "--variant=fp16"),
    "D38": ("--push_to_hub",),
}


OURS = [difference for difference in differences.DIFFERENCES if SCRIPT.name in difference.scripts]


@pytest.mark.parametrize("difference", OURS, ids=lambda difference: difference.name)
def test_differences_are_said_and_documented(difference: differences.Difference) -> None:
    environment = {"WORLD_SIZE": "2"} if difference.name == "D4" else {}
    notes = job(*SHOWN[difference.name], environment=environment).notes
    assert any(difference.line in note for note in notes)
    assert f"| {difference.name} |" in (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")


def test_parse_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, start = parse(BASE)
    assert (config.train.batch_size, start.mode) == (32, "restart")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train_text_to_image_sdxl", tables.TEXT_TO_IMAGE),
        ("train_text_to_image_lora_sdxl", tables.TEXT_TO_IMAGE_LORA),
        ("train_dreambooth_lora_sdxl", tables.DREAMBOOTH_LORA),
        ("train_dreambooth_lora_sdxl_advanced", tables.DREAMBOOTH_LORA_ADVANCED),
    ],
)
def test_help_is_quick_and_complete(name: str, flags: tuple[Flag, ...]) -> None:
    script = ROOT / "scripts" / f"{name}.py"
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry:\n runpy.run_path({str(script)!r}, run_name='__main__')"
    code += "\nexcept SystemExit:\n assert not {'torch', 'diffusers', 'pydantic', 'accelerate'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(flag.name in done.stdout for flag in flags)
