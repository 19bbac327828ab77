"""Bad input to `sdxl convert` where whole models are involved: three lines, exit 2, nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trainer import files
from tests.convert.test_bad_conversions import explains, good


def changed(place: Path, base: Path, name: str) -> Path:
    """A single file of the tiny model with one tensor gone or of another shape."""
    from sdxl_trainer.formats import single_file

    single_file.pack(base, place / "whole.safetensors")
    found = load_file(place / "whole.safetensors")
    if name == "missing":
        del found["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    else:
        found["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    save_file(found, place / "src.safetensors")
    return place / "src.safetensors"


@pytest.mark.parametrize("name", ["missing", "shape"])
def test_models_with_wrong_tensors(
    name: str, base: Path, tmp_path: Path, convert: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    source = changed(tmp_path, base, name)
    assert convert(source, tmp_path / "dst", "--base", base) == 2
    explains(
        capfd.readouterr().err, "'unet' do not fit.*" + ("missing" if name == "missing" else "another shape"), "SDXL"
    )
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("words", "says", "fix"),
    [
        (("BASE", "dst", "--dtype", "fp16", "--set", "author=me"), "--set has no effect", "remove"),
        (("BASE", "dst"), "nothing to convert", "--dtype"),
        (("BASE", "dst", "--dtype", "fp16", "--rank", "4"), "--rank has no effect", "remove"),
        (("BASE", "dst.safetensors", "--extract-from", "BASE"), "needs a rank", "--rank 32"),
        (("BASE", "dst.safetensors", "--extract-from", "BASE", "--rank", "2"), "same matrices", "fine-tuned"),
        (("BASE", "dst.safetensors", "--lora", "BASE"), "diffusers folder", "adapter"),
        (("BASE", "BASE/inside"), "lies in a folder that is read", "another place"),
        (("LORA", "dst.safetensors", "--lora", "BASE"), "diffusers folder", "adapter"),
        (
            ("BASE", "dst.safetensors", "--lora", "src.safetensors"),
            "does not fit|has no 1 of the weights",
            "of this shape",
        ),
    ],
)
def test_contradictions(
    words: tuple[str, ...],
    says: str,
    fix: str,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    convert: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    good(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files.tree_hashes(tmp_path)
    assert convert(*(w.replace("BASE", str(base)).replace("LORA", str(adapters["lora"])) for w in words)) == 2
    explains(capfd.readouterr().err, says, fix)
    assert files.tree_hashes(tmp_path) == before
