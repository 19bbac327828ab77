"""Embeddings between their layouts, as diffusers loads them; and what `--show` says of any file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trainer.formats import header, lora
from tests.conftest import draw_folder
from tests.convert.test_convert_models import load
from tests.formats.test_lora import mixed


def embedding(
    place: Path, names: tuple[str, str] = ("clip_l", "clip_g"), widths: tuple[int, int] = (768, 1280)
) -> Path:
    torch.manual_seed(0)
    save_file(
        {name: torch.randn(3, width) for name, width in zip(names, widths, strict=True)}, place / "cat.safetensors"
    )
    return place / "cat.safetensors"


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_embeddings_there_and_back(tmp_path: Path, convert: Callable[..., int], names: tuple[str, str]) -> None:
    source = embedding(tmp_path, names)
    assert convert(source, tmp_path / "learned", "--token", "<cat>") == 0
    halves = [load_file(tmp_path / "learned" / f"learned_embeds{end}.safetensors") for end in ("", "_2")]
    assert [list(half) for half in halves] == [["<cat>"], ["<cat>"]]
    for way in (tmp_path / "learned", tmp_path / "learned/learned_embeds.safetensors"):
        assert convert(way, tmp_path / "back.safetensors", "--overwrite") == 0
        before, after = load_file(source), load_file(tmp_path / "back.safetensors")
        assert list(after) == ["clip_g", "clip_l"]
        assert torch.equal(after["clip_l"], before[names[0]])
        assert torch.equal(after["clip_g"], before[names[1]])
    told = header.described(tmp_path / "back.safetensors", "")[1]
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"


def test_diffusers_loads_the_embedding(base: Path, tmp_path: Path, convert: Callable[..., int]) -> None:
    widths = (24, 40)  # of the tiny model
    source = embedding(tmp_path, widths=widths)
    assert convert(source, tmp_path / "learned", "--token", "<cat>") == 0
    pipeline = load(base, base)
    for end, tokenizer, encoder in (("", "tokenizer", "text_encoder"), ("_2", "tokenizer_2", "text_encoder_2")):
        model, words = getattr(pipeline, encoder), getattr(pipeline, tokenizer)
        pipeline.load_textual_inversion(
            tmp_path / f"learned/learned_embeds{end}.safetensors", text_encoder=model, tokenizer=words
        )
        vectors = load_file(source)["clip_l" if end == "" else "clip_g"]
        found = model.get_input_embeddings().weight[words.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])]
        assert torch.equal(found, vectors)


def test_show_an_adapter(tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    tags = json.dumps({"1_cat": {"a cat": 9, "[sits]": 4}, "2_more": {"a cat": 1}})
    entries = {"ss_tag_frequency": tags, "modelspec.trigger_phrase": "sks", "ss_training_started_at": "1700000000.5"}
    entries |= {"ss_steps": "120", "ss_base_model_version": "sdxl_base_v1-0"}
    lora.write(mixed(), tmp_path / "a.safetensors", "kohya", entries)
    before = (tmp_path / "a.safetensors").read_bytes()
    assert convert(tmp_path / "a.safetensors", "--show") == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "a.safetensors: SDXL adapter, kohya and ComfyUI layout",
        "4 modules, dora and lora, rank 6 (x 3), 2",
        "trigger sks",
        "a cat (10), [sits] (4)",
        "2023-11-14 22:13 UTC",
        "steps 120",
    ):
        assert text in said, said
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_show_anything(
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(base, tmp_path / "model.safetensors") == 0
    for path, words in (
        (base, "diffusers folder"),
        (tmp_path / "model.safetensors", "levels of 1 layers"),
        (adapters["lora"].parent, "rank 4, alpha / rank 0.75"),
        (embedding(tmp_path), "vectors 3 of 768 and 1280"),
    ):
        capsys.readouterr()
        assert convert(path, "--show") == 0
        assert words in " ".join(capsys.readouterr().out.split())


def test_new_words_of_a_run_go_to_diffusers_files(
    config: Callable[..., object],
    base: Path,
    tmp_path: Path,
    convert: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The file of a run has both encoders' vectors in it, and the words in its header."""
    from sdxl_trainer.train import train

    (tmp_path / "pictures").mkdir()
    pictures = draw_folder(tmp_path / "pictures", [(64, 64), (64, 64)])
    captions = (pictures / "metadata.jsonl").read_text().replace("red", "<cat>").replace("circle", "<hat>")
    (pictures / "metadata.jsonl").write_text(captions)
    words = [{"name": "<cat>"}, {"name": "<hat>", "vectors": 2}]
    train(config(token=words, data=[{"path": str(pictures)}], train={"steps": 1}))
    trained = load_file(tmp_path / "run/learned_embeds.safetensors")
    assert {name: len(rows) for name, rows in trained.items()} == {"clip_l": 3, "clip_g": 3}
    assert convert(tmp_path / "run/learned_embeds.safetensors", tmp_path / "both") == 2
    assert "2 words: <cat>, <hat>" in capfd.readouterr().err
    single = next(path for path in (tmp_path / "run").rglob("hat.safetensors"))
    assert convert(single, tmp_path / "hat") == 0
    halves = [load_file(tmp_path / "hat" / f"learned_embeds{end}.safetensors") for end in ("", "_2")]
    assert torch.equal(halves[0]["<hat>"], trained["clip_l"][1:])
    assert torch.equal(halves[1]["<hat>"], trained["clip_g"][1:])
