"""The flags of the two LoRA scripts: what each does to the config, what is said, what is refused."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trainer.compat import differences, flags, tables, train_dreambooth_lora_sdxl, train_text_to_image_lora_sdxl
from sdxl_trainer.compat.command import Job
from sdxl_trainer.errors import UserError
from tests.compat.test_compat_flags import value

DOCS = Path(__file__).parents[2] / "docs" / "compat.md"
BASE = ["--pretrained_model_name_or_path=base", "--report_to=none", "--seed=1"]
SUBJECT = [*BASE, "--instance_data_dir=dog", "--instance_prompt=a photo of sks dog"]
CLASS = ("--with_prior_preservation", "--class_data_dir=class", "--class_prompt=a dog")
TEXT = ("--train_text_encoder",)
PRODIGY = ("--optimizer=prodigy", "--learning_rate=1")


def lora(*argv: str) -> Job:
    return train_text_to_image_lora_sdxl.translate([*BASE, "--dataset_name=pictures", *argv], {}, lambda: 7)


def dreambooth(*argv: str, environment: dict[str, str] | None = None) -> Job:
    return train_dreambooth_lora_sdxl.translate([*SUBJECT, *argv], environment or {}, lambda: 7)


def test_defaults_of_the_lora_script() -> None:
    config = lora().config
    assert config.output_dir == "sd-model-finetuned-lora"
    assert (config.train.epochs, config.train.batch_size, config.train.learning_rate) == (100, 16, 1e-4)
    adapter = config.adapter
    assert adapter is not None
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.init) == ("lora", 4, 4.0, "gaussian")
    assert (adapter.parts, adapter.targets, adapter.dropout) == (("unet",), "attention", 0.0)
    assert (config.optimizer.weight_decay, config.learn) == (1e-2, ())


def test_defaults_of_the_dreambooth_script() -> None:
    config = dreambooth().config
    assert config.output_dir == "lora-dreambooth-model"
    assert (config.train.epochs, config.train.batch_size, config.train.micro_batch) == (1, 4, 4)
    data = config.data[0]
    assert (data.path, data.caption, data.caption_only) == ("dog", "a photo of sks dog", True)
    assert (data.repeats, data.resolution, data.crop, len(config.data)) == (1.0, 1024, "random", 1)
    assert (config.optimizer.name, config.optimizer.weight_decay, config.learn) == ("adamw", 1e-4, ())
    assert dreambooth("--validation_prompt=a").config.validation.every_epochs == 50


@pytest.mark.parametrize("flag", flags.ADVANCED)
def test_flags_of_the_advanced_script_say_where_they_are(flag: str) -> None:
    with pytest.raises(UserError, match=f"unknown flag {flag}") as caught:
        dreambooth(flag)
    assert "train_dreambooth_lora_sdxl_advanced.py has it" in caught.value.fix
    assert flag in {row.name for row in tables.DREAMBOOTH_LORA_ADVANCED}


EFFECTS: list[tuple[str, str, Any, tuple[str, ...]]] = [
    ("--instance_data_dir=cat", "data.0.path", "cat", ()),
    ("--instance_prompt=a sks cat", "data.0.caption", "a sks cat", ()),
    ("--repeats=3", "data.0.repeats", 3.0, ()),
    ("--with_prior_preservation", "data.1.regularisation", True, CLASS[1:]),
    ("--class_data_dir=others", "data.1.path", "others", CLASS),
    ("--class_prompt=a hound", "data.1.caption", "a hound", CLASS),
    ("--prior_loss_weight=0.5", "data.1.weight", 1.0, CLASS),
    ("--prior_loss_weight=0.5", "data.0.weight", 2.0, CLASS),
    ("--num_class_images=7", "data.1.generate", 7, CLASS),
    ("--sample_batch_size=2", "data.1.generate_batch", 2, CLASS),
    ("--prior_generation_precision=bf16", "data.1.generate_precision", "bf16", CLASS),
    ("--prior_generation_precision=no", "data.1.generate_precision", "auto", CLASS),
    ("--train_batch_size=3", "train.batch_size", 6, CLASS),
    ("--train_batch_size=3", "train.micro_batch", 6, CLASS),
    ("--resolution=512", "data.1.resolution", 512, CLASS),
    ("--center_crop", "data.1.crop", "center", CLASS),
    ("--random_flip", "data.1.flip", False, CLASS),
    ("--do_edm_style_training", "objective.weighting", "edm", ()),
    ("--output_kohya_format", "export.formats", ("kohya",), ()),
    ("--output_kohya_format", "export.name", "pytorch_lora_weights_kohya", ()),
    ("--text_encoder_lr=1e-6", "learn.1.learning_rate", 1e-6, TEXT),
    ("--text_encoder_lr=0", "learn.1.learning_rate", None, TEXT),
    ("--adam_weight_decay_text_encoder=0.5", "learn.1.weight_decay", 0.5, TEXT),
    ("--train_text_encoder", "learn.1.learning_rate", 5e-6, ()),
    ("--train_text_encoder", "adapter.parts", ("unet", "text_encoder", "text_encoder_2"), ()),
    ("--lr_num_cycles=3", "schedule.cycles", 3, ("--lr_scheduler=cosine_with_restarts",)),
    ("--lr_power=2", "schedule.power", 2.0, ("--lr_scheduler=polynomial",)),
    ("--optimizer=Prodigy", "optimizer.name", "prodigy", PRODIGY[1:]),
    ("--optimizer=adamw", "optimizer.name", "adamw", ()),
    ("--use_8bit_adam", "optimizer.name", "adamw8bit", ()),
    ("--use_8bit_adam", "optimizer.name", "prodigy", PRODIGY),
    ("--prodigy_beta3=0.9", "optimizer.arguments", 0.9, PRODIGY),
    ("--prodigy_decouple=False", "optimizer.arguments", False, PRODIGY),
    ("--prodigy_use_bias_correction=false", "optimizer.arguments", False, PRODIGY),
    ("--prodigy_safeguard_warmup=0", "optimizer.arguments", False, PRODIGY),
    ("--rank=8", "adapter.rank", 8, ()),
    ("--rank=8", "adapter.alpha", 8.0, ()),
    ("--lora_dropout=0.1", "adapter.dropout", 0.1, ()),
    ("--use_dora", "adapter.kind", "dora", ()),
    ("--caption_column=words", "data.0.caption_column", "words", ()),
    ("--image_column=picture", "data.0.image_column", "picture", ()),
    ("--dataset_config_name=c", "data.0.name", "c", ()),
]
OF_DATASETS = ("--caption_column", "--image_column", "--dataset_config_name")


@pytest.mark.parametrize(("flag", "path", "expected", "more"), EFFECTS)
def test_each_flag_sets_what_it_says(flag: str, path: str, expected: Any, more: tuple[str, ...]) -> None:
    name = flag.partition("=")[0]
    if name in OF_DATASETS:
        argv = [*BASE, "--dataset_name=pictures", "--instance_prompt=sks", flag]
        found = value(train_dreambooth_lora_sdxl.translate(argv, {}, lambda: 7).config, path)
    else:
        found = value(dreambooth(*more, flag).config, path)
    assert (found[name.removeprefix("--prodigy_")] if path == "optimizer.arguments" else found) == expected


def test_every_flag_of_its_own_has_an_effect_tested_here() -> None:
    own = {flag.name for flag in tables.DREAMBOOTH_LORA} - {flag.name for flag in tables.TEXT_TO_IMAGE}
    assert own - {row[0].partition("=")[0] for row in EFFECTS} == set()
    assert lora("--debug_loss").config.log.pictures
    assert lora(*TEXT).config.adapter == lora().config.adapter.model_copy(  # type: ignore[union-attr]
        update={"parts": ("unet", "text_encoder", "text_encoder_2")}
    )


def test_prodigy_is_the_scripts() -> None:
    config = dreambooth(*PRODIGY, *TEXT).config
    assert config.optimizer.arguments == {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    assert [rule.learning_rate for rule in config.learn] == [None, None]
    assert config.learn[1].weight_decay == 1e-3


def test_an_epoch_goes_through_the_larger_set(tmp_path: Path) -> None:
    """And pictures of the class that are there beyond the wanted number are left out, with a word."""
    for folder, count in (("dog", 4), ("class", 6)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (64, 64)).save(tmp_path / folder / f"{number}.png")
    where = (f"--instance_data_dir={tmp_path / 'dog'}", *CLASS, f"--class_data_dir={tmp_path / 'class'}")
    first, second = dreambooth(*where, "--num_class_images=10").config.data
    assert (first.repeats, second.generate, second.max_samples) == (2.5, 10, None)
    job = dreambooth(*where, "--num_class_images=5", "--repeats=2")
    first, second = job.config.data
    assert (first.repeats, second.generate, second.max_samples) == (2.0, 0, 5)
    assert any("5 of the 6 pictures" in note for note in job.notes)


NOTES: list[tuple[tuple[str, ...], str]] = [
    (CLASS[1:], "--class_data_dir has no effect: --with_prior_preservation is not given"),
    (("--num_class_images=9",), "--num_class_images has no effect"),
    (("--text_encoder_lr=1e-5",), "--text_encoder_lr has no effect: --train_text_encoder is not given"),
    ((*PRODIGY, *TEXT, "--text_encoder_lr=1e-5"), "--text_encoder_lr has no effect: prodigy"),
    (("--prodigy_beta3=0.5",), "--prodigy_beta3 has no effect: --optimizer is not prodigy"),
    ((*PRODIGY, "--use_8bit_adam"), "--use_8bit_adam has no effect"),
    (("--lr_power=2",), "--lr_power has no effect: --lr_scheduler is not 'polynomial'"),
    (("--caption_column=words",), "--caption_column has no effect: --instance_data_dir is a folder"),
]


@pytest.mark.parametrize(("argv", "note"), NOTES)
def test_what_does_nothing_is_said(argv: tuple[str, ...], note: str) -> None:
    assert any(note in line for line in dreambooth(*argv).notes)


ERRORS: list[tuple[tuple[str, ...], str, str]] = [
    (("--dataset_name=d",), "--dataset_name and --instance_data_dir are both given", "one of them"),
    (CLASS[:1], "--with_prior_preservation without --class_data_dir", "leave out --with_prior_preservation"),
    (CLASS[:2], "--with_prior_preservation without --class_prompt", "give --class_prompt"),
    ((*CLASS, "--prior_loss_weight=0"), "--prior_loss_weight = 0", "greater than 0"),
    ((*CLASS, "--num_class_images=-1"), "--num_class_images = -1", "greater than or equal to 0"),
    ((*CLASS, "--sample_batch_size=0"), "--sample_batch_size = 0", "greater than 0"),
    (("--do_edm_style_training", "--snr_gamma=5"), "--do_edm_style_training and --snr_gamma", "one of them"),
    (("--optimizer=adamm",), "--optimizer = adamm is not allowed", "did you mean 'AdamW'?"),
    (("--optimizer=prodigy",), "--learning_rate = 0.0001 with prodigy", "--learning_rate = 1.0"),
    (("--prodigy_decouple=maybe",), "--prodigy_decouple = maybe is not true or false", "default: True"),
    (("--rank=0",), "--rank = 0", "greater than 0"),
    (("--repeats=0",), "--repeats = 0", "greater than 0"),
    (("--lora_dropout=1",), "--lora_dropout = 1", "less than 1"),
    (("--prior_generation_precision=fp8",), "--prior_generation_precision = fp8", "allowed: no, fp32, fp16, bf16"),
    (("--train_data_dir=x",), "unknown flag --train_data_dir", "did you mean"),
]


@pytest.mark.parametrize(("argv", "what", "fix"), ERRORS)
def test_mistakes_name_the_flag_and_the_fix(argv: tuple[str, ...], what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        dreambooth(*argv)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_subject_needs_a_prompt_and_pictures() -> None:
    for argv, what in (
        ([*BASE, "--instance_data_dir=dog"], "--instance_prompt is missing"),
        ([*BASE, "--instance_prompt=a"], "no pictures"),
    ):
        with pytest.raises(UserError, match=what):
            train_dreambooth_lora_sdxl.translate(argv, {}, lambda: 7)


# A command line on which each difference of the two scripts shows.
SHOWN: dict[str, tuple[str, ...]] = {
    "D4": (),
    "D5": ("--mixed_precision=fp16",),
    "D6": ("--mixed_precision=bf16",),
    "D8": ("--random_flip",),
    "D9": ("--lr_scheduler=cosine", "--gradient_accumulation_steps=2"),
    "D10": ("--resume_from_checkpoint=latest",),
    "D15": (*CLASS, "--snr_gamma=5"),
    "D16": ("--snr_gamma=5",),
    "D18": ("--mixed_precision=bf16",),
    "D19": ("--validation_prompt=a cat",),
    "D26": CLASS,
    "D27": (*PRODIGY, "--prodigy_decouple=false"),
    "D28": ("--output_kohya_format",),
    "D35": ("--pretrained_vae_model_name_or_path=v", "--variant=fp16"),
    "D38": ("--push_to_hub",),
}
BOTH = (differences.LORA, differences.DREAMBOOTH)
PAIRS = [(d, script) for d in differences.DIFFERENCES for script in d.scripts if script in BOTH]


@pytest.mark.parametrize(("difference", "script"), PAIRS, ids=lambda part: getattr(part, "name", part))
def test_differences_are_said_and_documented(difference: differences.Difference, script: str) -> None:
    environment = {"WORLD_SIZE": "2"} if difference.name == "D4" else {}
    module = {s.SCRIPT.name: s for s in (train_text_to_image_lora_sdxl, train_dreambooth_lora_sdxl)}[script]
    data = SUBJECT if script == differences.DREAMBOOTH else [*BASE, "--dataset_name=pictures"]
    notes = module.translate([*data, *SHOWN[difference.name]], environment, lambda: 7).notes
    assert any(difference.line in note for note in notes)
    assert f"| {difference.name} |" in DOCS.read_text(encoding="utf-8")


def test_nothing_is_said_where_nothing_differs() -> None:
    assert lora().notes == ()
    assert dreambooth("--center_crop").notes == ()
