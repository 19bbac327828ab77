"""The advanced DreamBooth script: what each of its own flags does, what is refused, and what a run leaves."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer.compat import advanced, differences, tables, train_dreambooth_lora_sdxl_advanced
from sdxl_trainer.compat.command import Job
from sdxl_trainer.errors import UserError
from tests.compat.test_compat_flags import value
from tests.compat.test_lora_end_to_end import COMMON, FILE, PARTS, captioned, subject  # noqa: F401  (fixtures)
from tests.compat.test_lora_flags import CLASS, DOCS, PRODIGY, SHOWN, SUBJECT, TEXT

TI = ("--train_text_encoder_ti",)
# The command of the script's own README, for pictures with captions.
README = """
    --dataset_name=3d_icon --caption_column=prompt
    --mixed_precision=bf16 --resolution=1024 --train_batch_size=3 --repeats=1 --gradient_accumulation_steps=1
    --gradient_checkpointing --learning_rate=1.0 --text_encoder_lr=1.0 --optimizer=prodigy --train_text_encoder_ti
    --train_text_encoder_ti_frac=0.5 --snr_gamma=5.0 --lr_scheduler=constant --lr_warmup_steps=0 --rank=8
    --max_train_steps=1000 --checkpointing_steps=2000 --seed=0 --push_to_hub --report_to=none
    --pretrained_model_name_or_path=base --output_dir=3d-icon-SDXL-LoRA
""".split()


def job(*argv: str, environment: dict[str, str] | None = None) -> Job:
    return train_dreambooth_lora_sdxl_advanced.translate([*SUBJECT, *argv], environment or {}, lambda: 7)


def test_the_command_of_its_readme() -> None:
    prompt = "a TOK icon of an astronaut riding a horse, in the style of TOK"
    argv = [*README, "--instance_prompt=3d icon in the style of TOK", f"--validation_prompt={prompt}"]
    config = train_dreambooth_lora_sdxl_advanced.translate(argv, {}, lambda: 7).config
    (word,) = config.token
    assert (word.name, word.vectors, word.placeholder) == ("<s0>", 2, "TOK")
    assert config.data[0].caption == "3d icon in the style of <s0>"
    assert (config.data[0].caption_column, config.data[0].caption_only) == ("prompt", False)
    assert config.validation.prompts == (prompt.replace("TOK", "<s0>"),)
    assert [(rule.match, rule.learning_rate, rule.until) for rule in config.learn] == [
        (r"unet\..*", None, 1.0),
        ("text_encoder.*", None, 0.5),
    ]
    assert (config.optimizer.name, config.adapter.parts) == ("prodigy", ("unet",))  # type: ignore[union-attr]
    assert config.export.formats == ("kohya", "embeddings")


EFFECTS: list[tuple[str, str, Any, tuple[str, ...]]] = [
    ("--train_text_encoder_ti", "token.0.placeholder", "TOK", ()),
    ("--train_text_encoder_ti", "learn.1.learning_rate", 5e-6, ()),
    ("--train_text_encoder_ti", "learn.1.weight_decay", 1e-4, ()),
    ("--train_text_encoder_ti", "learn.1.until", 0.5, ()),
    ("--adam_weight_decay_text_encoder=0", "learn.1.weight_decay", 0.0, TI),
    ("--token_abstraction=dog", "data.0.caption", "a photo of sks <s0>", TI),
    ("--token_abstraction=photo, dog", "data.0.caption", "a <s0> of sks <s2>", TI),
    ("--token_abstraction=do,PHOTO,phot", "data.0.caption", "a <s2> of sks dog", TI),
    ("--token_abstraction=a,ab", "token.1.name", "<s2>", TI),
    ("--num_new_tokens_per_abstraction=3", "token.0.vectors", 3, TI),
    ("--train_text_encoder_ti_frac=0.25", "learn.1.until", 0.25, TI),
    ("--train_text_encoder_frac=0.75", "learn.1.until", 0.75, TEXT),
    ("--clip_skip=1", "text.clip_skip", 3, ()),
    ("--use_blora", "adapter.targets", None, ()),
    ("--lora_unet_blocks=unet.mid_block", "adapter.targets", None, ()),
    ("--cache_latents", "cache.path", None, ()),
    ("--noise_offset=0.1", "objective.noise_offset", 0.1, ()),
    ("--adam_weight_decay_text_encoder=0.5", "learn.1.weight_decay", 0.5, TEXT),
    ("--rank=8", "export.formats", ("kohya",), ()),
]


@pytest.mark.parametrize(("flag", "path", "expected", "more"), EFFECTS)
def test_each_flag_sets_what_it_says(flag: str, path: str, expected: Any, more: tuple[str, ...]) -> None:
    if expected is not None:
        assert value(job(*more, flag).config, path) == expected


def test_every_flag_of_its_own_is_tested_here() -> None:
    own = {flag.name for flag in tables.DREAMBOOTH_LORA_ADVANCED} - {flag.name for flag in tables.DREAMBOOTH_LORA}
    assert own - {row[0].partition("=")[0] for row in EFFECTS} == set()
    assert job("--cache_latents").config == job().config, "they are always"


LAYERS = {
    "unet.up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q": True,
    "unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0": True,
    "unet.up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_k": False,
    "unet.up_blocks.0.attentions.1.transformer_blocks.1.ff.net.2": False,
    "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k": False,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v": False,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": False,
}


def test_blocks() -> None:
    def chosen(*argv: str) -> set[str]:
        targets = job(*argv).config.adapter.targets  # type: ignore[union-attr]
        return {name for name in LAYERS if re.fullmatch(targets, name)}

    wanted = {name for name, found in LAYERS.items() if found}
    assert chosen("--use_blora") == wanted
    assert chosen(f"--lora_unet_blocks={advanced._BLORA}") == wanted
    (encoder,) = (name for name in LAYERS if name.startswith("text"))
    assert chosen("--use_blora", *TEXT) == wanted | {encoder}
    assert len(chosen("--lora_unet_blocks= unet.mid_block , unet.up_blocks.1")) == 2
    assert (
        job("--use_blora").config.adapter.targets == job("--use_blora", "--lora_unet_blocks=x").config.adapter.targets
    )  # type: ignore[union-attr]


NOTES: list[tuple[tuple[str, ...], str]] = [
    (("--token_abstraction=x",), "--token_abstraction has no effect: --train_text_encoder_ti is not given"),
    (("--train_text_encoder_ti_frac=0.1",), "--train_text_encoder_ti_frac has no effect"),
    (("--train_text_encoder_frac=0.1",), "--train_text_encoder_frac has no effect: --train_text_encoder is not given"),
    (("--use_blora", "--lora_unet_blocks=unet.x"), "--lora_unet_blocks has no effect: --use_blora names the blocks"),
]


@pytest.mark.parametrize(("argv", "note"), NOTES)
def test_what_does_nothing_is_said(argv: tuple[str, ...], note: str) -> None:
    assert any(note in line for line in job(*argv).notes)


ERRORS: list[tuple[tuple[str, ...], str, str]] = [
    ((*TI, *TEXT), "--train_text_encoder_ti and --train_text_encoder", "one of them"),
    ((*TI, "--train_text_encoder_ti_frac=0"), "--train_text_encoder_ti_frac = 0 is not a share", "more than 0"),
    ((*TEXT, "--train_text_encoder_frac=2"), "--train_text_encoder_frac = 2 is not a share", "at most 1"),
    ((*TI, "--token_abstraction= ,"), "--token_abstraction names no word", "TOK"),
    ((*TI, "--num_new_tokens_per_abstraction=0"), "--num_new_tokens_per_abstraction = 0", "greater than 0"),
    (("--lora_unet_blocks=up_blocks.0",), "up_blocks.0 names no block", "unet.up_blocks.0"),
    (("--clip_skip=-3",), "--clip_skip", ""),
    (("--output_kohya_format",), "unknown flag --output_kohya_format", ""),
]


@pytest.mark.parametrize(("argv", "what", "fix"), ERRORS)
def test_mistakes_name_the_flag_and_the_fix(argv: tuple[str, ...], what: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        job(*argv)
    assert what in caught.value.what
    assert fix in caught.value.fix


OWN = {
    "D40": (),
    "D41": ("--clip_skip=1",),
    "D42": TI,
    "D43": ("--cache_latents",),
    "D44": (*CLASS, "--snr_gamma=5"),
    "D45": TI,
    "D28": (),
    "D27": (*PRODIGY, "--prodigy_decouple=false"),
}


@pytest.mark.parametrize(
    "difference",
    [d for d in differences.DIFFERENCES if differences.ADVANCED in d.scripts],
    ids=lambda difference: difference.name,
)
def test_differences_are_said_and_documented(difference: differences.Difference) -> None:
    environment = {"WORLD_SIZE": "2"} if difference.name == "D4" else {}
    notes = job(*(SHOWN | OWN)[difference.name], environment=environment).notes
    assert any(difference.line in note for note in notes)
    assert f"| {difference.name} |" in DOCS.read_text(encoding="utf-8")


# Whole runs


def trained(argv: list[str], output: Path) -> None:
    assert train_dreambooth_lora_sdxl_advanced.main([*argv, *COMMON, f"--output_dir={output}"]) == 0


def test_new_words_are_loaded_as_its_readme_does(captioned: list[str], base: Path, tmp_path: Path) -> None:  # noqa: F811
    """Identifiers are looked for in the data set's captions; its files are there under its names and do something."""
    from diffusers import DiffusionPipeline

    output = tmp_path / "icons"
    words = ["--train_text_encoder_ti", "--token_abstraction=circle", "--text_encoder_lr=0.1"]
    steps = ["--max_train_steps=4", "--checkpointing_steps=2"]
    trained([*captioned, "--caption_column=text", "--instance_prompt=a circle", *words, *steps], output)
    assert {p.name for p in output.glob("*.safetensors")} == {
        FILE,
        "icons.safetensors",
        "icons_emb.safetensors",
        "learned_embeds.safetensors",
    }
    middle, end = (load_file(output / f"checkpoint-{step}" / "learned_embeds.safetensors") for step in (2, 4))
    rows = load_file(output / "icons_emb.safetensors")
    assert all(torch.equal(middle[key], end[key]) and torch.equal(rows[key], end[key]) for key in rows)

    pipeline = DiffusionPipeline.from_pretrained(base, add_watermarker=False)
    pipeline.load_lora_weights(output, weight_name=FILE)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(pipeline, f"text_encoder{number}"), getattr(pipeline, f"tokenizer{number}")
        for token, row in zip(("<s0>", "<s1>"), rows[key], strict=True):
            pipeline.load_textual_inversion(row, token, text_encoder=encoder, tokenizer=tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a <s0><s1>", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_captions_without_the_identifier_are_refused(subject: list[str], tmp_path: Path, capfd: Any) -> None:  # noqa: F811
    argv = [*subject, *COMMON, *TI, "--max_train_steps=2", f"--output_dir={tmp_path / 'run'}"]
    assert train_dreambooth_lora_sdxl_advanced.main(argv) == 2
    assert "no caption holds the new word 'TOK'" in capfd.readouterr().err


def test_blora_of_one_picture(subject: list[str], base: Path, tmp_path: Path, capfd: Any) -> None:  # noqa: F811
    """Only the layers of its blocks are in the file; the picture is cut in its middle."""
    (tmp_path / "imgs" / "1.jpg").unlink()
    trained([*subject, "--lora_unet_blocks=unet.up_blocks.0.attentions.0", "--max_train_steps=2"], tmp_path / "run")
    names = set(load_file(tmp_path / "run" / FILE))
    assert names
    assert all(name.startswith(f"{PARTS[0]}up_blocks.0.attentions.0.") for name in names)
    said = capfd.readouterr().err
    assert "a single picture is cut in its middle" in said
    learn = sum(tensor.numel() for tensor in load_file(tmp_path / "run" / FILE).values())
    assert f"1 picture, 2 steps of 1: 2 epochs; {learn:,} parameters learn\n" in said
