"""New words: only their rows move, resume is bitwise, and others read them: diffusers, `sdxl sample`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_trainer import base as bases
from sdxl_trainer import configfile, sample, text, tokens
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Model, TextOptions, Token
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.sampling import order
from sdxl_trainer.train import train
from tests.test_sample import pixels

WORDS = [{"name": "<x>", "vectors": 3, "init": "red circle"}, {"name": "<y>"}]
DATA = [{"path": "", "caption_dropout": 0.2}]
VALIDATION = {"prompts": ["a <x> by <y>"], "images": 1, "steps": 3, "guidance": 4.0, "seed": 5}
TRAIN = {"steps": 4, "learning_rate": 1e-1, "checkpoint_every": 2}


@pytest.fixture
def named(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """The pictures with captions that hold the words."""
    import shutil

    folder = tmp_path / "named"
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] += " <x>, <y>"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": [{"path": str(folder), "caption_dropout": 0.2}], "token": WORDS}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def test_a_run_leaves_exactly_these_files(config: Callable[..., Any], named: dict[str, Any]) -> None:
    output = train(config(**named, train=TRAIN, ema={"enabled": True}))
    records = {"config.toml", "manifest.json", "metrics.jsonl", "report.html", "README.md"}
    results = {"learned_embeds.safetensors", "embeddings", "learned_embeds_raw.safetensors", "embeddings_raw"}
    assert {p.name for p in output.iterdir()} == {*records, *results, "checkpoint-2", "checkpoint-4"}
    assert {p.name for p in (output / "embeddings").iterdir()} == {"x.safetensors", "y.safetensors"}
    both, x, y = (load_file(output / f"{n}.safetensors") for n in ("learned_embeds", "embeddings/x", "embeddings/y"))
    assert {name: list(rows.shape) for name, rows in both.items()} == {"clip_l": [4, 24], "clip_g": [4, 40]}
    assert all(torch.equal(both[key], torch.cat([x[key], y[key]])) for key in both)
    kept = {"added.safetensors", "added_ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {p.name for p in (output / "checkpoint-2").iterdir()} == {*kept, "learned_embeds.safetensors", "embeddings"}


def test_captions_may_call_a_word_otherwise() -> None:
    """In any case, as a word of its own, and not by the beginning of another one's placeholder."""
    words = [Token(name="<s0>", vectors=2, placeholder="TOK"), Token(name="<s2>", placeholder="TOK2")]
    assert tokens.expand(words, "a tok, TOK2, <s0>, TOK3, stock") == "a <s0> <s0>_1, <s2>, <s0> <s0>_1, TOK3, stock"
    tokens.refuse_unread(words, ["TOK of tok2"])
    with pytest.raises(UserError, match="no caption holds the new word 'TOK2' as a word of its own"):
        tokens.refuse_unread(words, ["TOK", "<s2"])
    for second in ("<Y>", "x"):
        words = [{"name": "<x>", "placeholder": "X"}, {"name": "<y>", "placeholder": second}]
        tree = {"model": {"path": "b"}, "data": [{"path": "p"}], "train": {"steps": 1}, "token": words}
        with pytest.raises(UserError, match="called alike"):
            configfile.validated({"output_dir": "o", **tree}, "x.toml")


def test_resume_is_bitwise(config: Callable[..., Any], named: dict[str, Any], tmp_path: Path) -> None:
    whole = train(config(**named, train=TRAIN, output_dir=str(tmp_path / "whole")))
    train(config(**named, train={**TRAIN, "steps": 2}))
    parted = train(config(**named, train=TRAIN))
    assert losses(parted) == losses(whole)
    one, two = (load_file(output / "learned_embeds.safetensors") for output in (whole, parted))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all((rows[i] != rows[j]).any() for rows in one.values() for i in range(4) for j in range(i))


@pytest.mark.parametrize("pivotal", [False, True])
def test_sample_and_diffusers_draw_what_the_live_model_draws(
    config: Callable[..., Any], named: dict[str, Any], base: Path, tmp_path: Path, pivotal: bool
) -> None:
    from diffusers import StableDiffusionXLPipeline

    more = {"adapter": {"rank": 4, "parts": ["unet", "text_encoder"]}} if pivotal else {}
    output = train(config(**named, **more, train=TRAIN, validation={**VALIDATION, "at_start": True}))
    live, start = (pixels(output / "samples" / f"step-{step:06}" / "0-0.png") for step in (4, 0))
    assert np.abs(live - start).max() > 2
    settings = {"steps": 3, "guidance": 4.0, "height": 64, "width": 64, "seed": 5, "embeddings": (str(output),)}
    settings |= {"loras": (str(output),)} if pivotal else {}
    (path,) = sample.run(order.made(str(base), settings, ["a <x> by <y>"]), tmp_path / "s")
    assert np.abs(pixels(path) - live).max() <= 1

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if pivotal:
        pipeline.load_lora_weights(output)
    for word in ("x", "y"):
        rows = load_file(output / "embeddings" / f"{word}.safetensors")
        for key, i in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipeline, f"text_encoder{i}"), getattr(pipeline, f"tokenizer{i}")
            pipeline.load_textual_inversion(rows[key], f"<{word}>", text_encoder=encoder, tokenizer=tokenizer)
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    drawn = pipeline(
        "a <x> by <y>", num_inference_steps=3, guidance_scale=4.0, height=64, width=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(drawn).astype(int) - live).max() <= 1


def test_pivotal_tuning_leaves_the_words_when_their_share_is_over(
    config: Callable[..., Any], named: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [
        {"match": r".*token_embedding\.new\..*", "until": 0.5, "learning_rate": 0.1},
        {"match": ".*", "learning_rate": 0.05},
    ]
    output = train(config(**named, adapter={"rank": 2}, learn=rules, train=TRAIN))
    middle, end = (load_file(output / f"checkpoint-{step}" / "added.safetensors") for step in (2, 4))
    words = {name for name in end if "token_embedding.new" in name}
    assert len(words) == 4
    assert all(torch.equal(middle[name], end[name]) == (name in words) for name in end)
    rows = read_metrics(output / "metrics.jsonl")
    rates = [{rules[0]["match"]: rate, ".*": 0.05} for rate in (0.1, 0.0)]
    assert [row["learning_rates"] for row in rows] == [rates[0], rates[0], rates[1], rates[1]]
    assert [row["learning_rate"] for row in rows] == [0.1, 0.1, 0.0, 0.0]
    assert "lr 0 to 0.05  " in capsys.readouterr().err
    assert "Learning rate of the first rule" in (output / "report.html").read_text()
    with pytest.raises(UserError, match=r"nothing learns after 0\.5 of the run"):
        train(config(**named, learn=[{"match": ".*", "until": 0.5}], output_dir=f"{output}-2"))


def test_only_the_words_move(config: Callable[..., Any], named: dict[str, Any]) -> None:
    from sdxl_trainer import setup
    from sdxl_trainer.run import CONTINUE, Stop
    from sdxl_trainer.train import _loop

    job = setup.prepare_job(config(**named, train=TRAIN, learn=[{"match": r".*new\.<x>"}]), CONTINUE)
    assert job is not None
    before = {name: p.detach().clone() for name, p in job.run.sdxl.named_parameters()}
    _loop(job, Stop())
    job.metrics.close()
    moved = {n for n, p in job.run.sdxl.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if name.endswith("new.<x>")}
    assert len(moved) == 2


def test_words_begin_as_their_options_say_and_the_end_is_found_by_id(base: Path, tmp_path: Path) -> None:
    from sdxl_trainer import model

    found = bases.resolve(Model(path=str(base)), tmp_path)
    sdxl = model.load(Model(path=str(base)), found, None, torch.float32, False, True)
    one_chunk = {"chunks": torch.tensor([[0]]), "kept": torch.ones(1, 2)}
    (read,) = text.tokenize(text.tokenizers(found), [Prompt("a red circle red")], TextOptions())
    plain = sdxl.embed(read.ids.long(), **one_chunk)
    words = (
        Token(name="<x>", vectors=3, init="red circle"),
        Token(name="<y>", init="<x>", vectors=3),
        Token(name="<z>"),
    )
    tokens.inject(sdxl, words, found, 0)
    both = tokens.tokenizers(found, words)
    for part, tokenizer in zip(("text_encoder", "text_encoder_2"), both, strict=True):
        rows = {
            n.rpartition(".")[2]: p for n, p in sdxl.named_parameters() if n.startswith(f"{part}.") and ".new." in n
        }
        table = next(m for m in sdxl.parts()[part].modules() if isinstance(m, tokens.Extended)).table.weight
        red, circle = tokenizer("red circle", add_special_tokens=False)["input_ids"]
        assert torch.equal(rows["<x>"], table[[red, circle, red]])
        assert torch.equal(rows["<y>"], rows["<x>"])
        assert rows["<z>"].std().item() == pytest.approx(table.std().item(), rel=0.5)
    # <x> stands for "red circle red": embeddings and the pooled state at the end of the text are the same.
    (read,) = text.tokenize(both, [tokens.expanded(words, Prompt("a <x>"))], TextOptions())
    assert read.ids.max() > both[0].eos_token_id
    for one, two in zip(plain, sdxl.embed(read.ids.long(), **one_chunk), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize(
    ("caption", "written", "rows"),
    [
        ("a <mycat> red <MYCAT>,", "a <MyCat> <MyCat>_1 red <MyCat> <MyCat>_1,", ["<MyCat>", "<MyCat>_1"] * 2),
        ("a<MyCat>'s tail", "a<MyCat> <MyCat>_1's tail", ["<MyCat>", "<MyCat>_1"]),
        ("a category, Cat, tomcat, (cat:1.2)", "a category, cat cat_1, tomcat, (cat cat_1:1.2)", ["cat", "cat_1"] * 2),
        ("cats of category", "cats of category", []),
    ],
)
def test_a_word_is_found_in_any_case_and_not_inside_others(
    base: Path, tmp_path: Path, caption: str, written: str, rows: list[str]
) -> None:
    words = (Token(name="<MyCat>", vectors=2), Token(name="cat", vectors=2))
    assert tokens.expand(words, caption) == written
    found = bases.resolve(Model(path=str(base)), tmp_path)
    for own, plain in zip(tokens.tokenizers(found, words), text.tokenizers(found), strict=True):
        ids = own(written, add_special_tokens=False)["input_ids"]
        assert own.convert_ids_to_tokens([i for i in ids if i >= len(plain)]) == rows
        old = " ".join(re.sub(r"<MyCat>_1|<MyCat>|\bcat_1\b|\bcat\b", " ", written).split())
        assert [i for i in ids if i < len(plain)] == plain(old, add_special_tokens=False)["input_ids"]


def test_a_word_of_other_case_or_inside_another_is_no_second_one(base: Path, tmp_path: Path) -> None:
    found = bases.resolve(Model(path=str(base)), tmp_path)
    with pytest.raises(UserError, match="'Circle' is already a token"):
        tokens.tokenizers(found, [Token(name="Circle")])
    with pytest.raises(UserError, match="no caption holds the new word 'cat' as a word of its own"):
        tokens.refuse_unread([Token(name="cat")], ["a category", "cats"])
    tokens.refuse_unread([Token(name="cat"), Token(name="<X>")], ["a Cat", "a<x>"])


def test_sample_reads_words_in_any_case_from_files_of_any_name(
    config: Callable[..., Any], named: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    output = train(config(**named, train={**TRAIN, "steps": 1}))
    foreign = tmp_path / "My.Cat v2.safetensors"  # a file of others, whose name is the word
    save_file(load_file(output / "learned_embeds.safetensors"), foreign)
    settings = {"steps": 2, "guidance": 1.0, "height": 64, "width": 64, "seed": 5, "embeddings": (str(foreign),)}
    prompts = ["a My.Cat v2", "a my.cat V2", "a xMy.Cat v2"]
    one, two, three = sample.run(order.made(str(base), settings, prompts), tmp_path / "s")
    assert np.array_equal(pixels(one), pixels(two))
    assert not np.array_equal(pixels(one), pixels(three))


def test_the_header_tells_whose_rows_are_which(config: Callable[..., Any], named: dict[str, Any]) -> None:
    output = train(config(**named, train={"steps": 1}))
    with safe_open(output / "learned_embeds.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["words"]) == [["<x>", 3], ["<y>", 1]]
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    again = {"token": [{**word, "init": None, "start": str(output)} for word in WORDS], "data": named["data"]}
    again["token"] = [{k: v for k, v in word.items() if v is not None} for word in again["token"]]
    second = train(config(**again, train={"steps": 1, "learning_rate": 1e-12}, output_dir=f"{output}-2"))
    one, two = (load_file(folder / "learned_embeds.safetensors") for folder in (output, second))
    assert all(torch.allclose(one[key], two[key], atol=1e-9) for key in one)
