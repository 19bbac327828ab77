"""Whole models through `sdxl convert`: bitwise there and back, read by stock diffusers, adapters merged exactly."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer import files
from sdxl_trainer.formats import folder, header, single_file
from tests.formats.test_single_file import assert_same_pipelines, outputs


def load(path: Path, base: Path) -> object:
    from diffusers import StableDiffusionXLPipeline

    if path.is_dir():
        return StableDiffusionXLPipeline.from_pretrained(path)
    return StableDiffusionXLPipeline.from_single_file(path, config=str(base), local_files_only=True)


def test_folder_file_folder_is_bitwise(base: Path, tmp_path: Path, convert: Callable[..., int]) -> None:
    assert convert(base, tmp_path / "one.safetensors") == 0
    assert convert(tmp_path / "one.safetensors", tmp_path / "back", "--base", base) == 0
    hashes = files.tree_hashes(tmp_path / "back")
    for component in folder.WEIGHTS:
        before, after = folder.read_weights(component, base), folder.read_weights(component, tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert convert(tmp_path / "back", tmp_path / "two.safetensors", "--metadata", "none") == 0
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert_same_pipelines(load(base, base), load(tmp_path / "one.safetensors", base))
    assert_same_pipelines(load(base, base), load(tmp_path / "back", base))
    assert convert(tmp_path / "one.safetensors", tmp_path / "third", "--base", base) == 0
    assert files.tree_hashes(tmp_path / "third") == hashes


def test_converting_again_gives_the_same_bytes(base: Path, tmp_path: Path, convert: Callable[..., int]) -> None:
    for number in "12":
        (tmp_path / number).mkdir()
        assert convert(base, tmp_path / number / "model.safetensors", "--dtype", "bf16") == 0
    assert (tmp_path / "1/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


@pytest.mark.parametrize("to", ["single", "folder"])
def test_dtype(base: Path, tmp_path: Path, convert: Callable[..., int], to: str) -> None:
    target = tmp_path / ("half.safetensors" if to == "single" else "half")
    assert convert(base, target, "--dtype", "fp16") == 0
    if to == "single":
        assert {entry["dtype"] for entry in header.read(target, "").values()} == {"F16"}
        assert convert(target, tmp_path / "folder", "--base", base) == 0
        target = tmp_path / "folder"
    for component in folder.WEIGHTS:
        before, after = folder.read_weights(component, base), folder.read_weights(component, target)
        assert all(torch.equal(before[name].half(), after[name]) for name in before)
    assert folder.read_config("text_encoder", target)["torch_dtype"] == "float16"
    assert load(target, base).unet.dtype == torch.float32  # as diffusers loads unless it is told otherwise


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("to", ["single", "folder"])
def test_merged_is_what_diffusers_computes_with_the_adapter(
    base: Path, adapters: dict[str, Path], tmp_path: Path, convert: Callable[..., int], name: str, to: str
) -> None:
    target = tmp_path / ("merged.safetensors" if to == "single" else "merged")
    assert convert(base, target, "--lora", adapters[name]) == 0
    pipeline = load(base, base)
    pipeline.load_lora_weights(adapters[name].parent)
    theirs, ours, plain = outputs(pipeline), outputs(load(target, base)), outputs(load(base, base))
    for key in ("noise", "context", "pooled"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=2e-4)
        assert (ours[key] - plain[key]).abs().max() > 0.01
    assert torch.equal(ours["picture"], plain["picture"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_merging_with_weights_for_each_part(
    base: Path, adapters: dict[str, Path], tmp_path: Path, convert: Callable[..., int]
) -> None:
    words = ["--lora", f"{adapters['lora']}=0.5,0,-1", "--lora", f"{adapters['other']}=0.25"]
    assert convert(base, tmp_path / "merged", *words) == 0
    pipeline = load(base, base)
    pipeline.load_lora_weights(adapters["lora"].parent, adapter_name="a")
    pipeline.load_lora_weights(adapters["other"].parent, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [{"unet": 0.5, "text_encoder": 0.0, "text_encoder_2": -1.0}, 0.25])
    theirs, ours = outputs(pipeline), outputs(load(tmp_path / "merged", base))
    for key in ("noise", "context", "pooled"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-4, atol=2e-4)
    untouched = folder.read_weights("text_encoder", tmp_path / "merged")
    assert all(torch.equal(untouched[n], w) for n, w in folder.read_weights("text_encoder", base).items())


def test_marks_and_metadata_travel(base: Path, tmp_path: Path, convert: Callable[..., int]) -> None:
    parts = {name: folder.read_weights(name, base) for name in folder.WEIGHTS}
    told = {"modelspec.author": "somebody", "ss_tag_frequency": "secret"}
    single_file.write(tmp_path / "v.safetensors", parts, told, v_prediction=True, zero_terminal_snr=True)
    words = ["--metadata", "minimal", "--set", "trigger_phrase=a cat", "--dtype", "fp16"]
    assert convert(tmp_path / "v.safetensors", tmp_path / "minimal.safetensors", *words) == 0
    about = single_file.about(tmp_path / "minimal.safetensors")
    assert (about.v_prediction, about.zero_terminal_snr) == (True, True)
    assert about.metadata["modelspec.trigger_phrase"] == "a cat"
    assert not {"modelspec.author", "ss_tag_frequency", "modelspec.date"} & about.metadata.keys()
    assert convert(tmp_path / "v.safetensors", tmp_path / "full.safetensors", "--set", "author=me") == 0
    full = single_file.about(tmp_path / "full.safetensors").metadata
    assert (full["modelspec.author"], full["ss_tag_frequency"]) == ("me", "secret")


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """Casting and writing 400 MB takes little more memory than its largest tensor of 4 MB."""
    source = tmp_path / "large.safetensors"
    with source.open("wb") as file:
        shapes = {
            f"t{n}": {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [n << 22, (n + 1) << 22]}
            for n in range(100)
        }
        import json

        text = json.dumps(shapes).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (100 << 22))
    code = f"""
from pathlib import Path
from pathlib import Path
from safetensors.torch import load_file
from sdxl_trainer.formats import stream
import torch
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
stream._bytes_before, most = stream._bytes, [0]
def counted(*arguments):
    made = stream._bytes_before(*arguments)
    most[0] = max(most[0], anonymous())
    return made
stream._bytes = counted
before = anonymous()
stream.write(Path({str(tmp_path / "half.safetensors")!r}), load_file({str(source)!r}), {{}}, torch.float16)
print(most[0] - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert int(done.stdout) < 40_000, "kB of memory that are no file's"
