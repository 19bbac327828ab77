"""What pictures say of themselves: to A1111 and civitai, to ComfyUI, and to this program, which draws them again."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trainer import sample
from sdxl_trainer.errors import UserError
from sdxl_trainer.sampling import metadata, order
from sdxl_trainer.sampling.request import Request
from sdxl_trainer.train import train

TOLD = {
    "negative": "a blue, square",
    "steps": 3,
    "guidance": 4.5,
    "seed": 11,
    "sampler": "DPM++ 2M Karras",
    "rescale": 0.5,
    "height": 64,
    "width": 72,
}


def drawn(base: Path, out: Path, prompt: str = "a red circle", **more: Any) -> Path:
    (path,) = sample.run(order.made(str(base), TOLD | more, [prompt]), out)
    return path


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def same(one: Path, two: Path) -> bool:
    with Image.open(one) as first, Image.open(two) as second:
        return bool((np.asarray(first) == np.asarray(second)).all())


# As A1111 (infotext_utils.re_param) and civitai read the text.
A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
CIVITAI = re.compile(r"<(lora|hypernet):([a-zA-Z0-9_.\-]+):([0-9.]+)>")


def test_a1111_and_civitai_read_the_settings(base: Path, tmp_path: Path) -> None:
    text = texts(drawn(base, tmp_path, prompt="a (red) circle"))["parameters"]
    prompt, negative, last = text.split("\n")
    assert prompt == r"a \(red\) circle", "brackets that were no emphasis must not become it"
    assert negative == "Negative prompt: a blue, square"
    assert last.startswith("Steps: ")
    pairs = dict(A1111.findall(last))
    assert pairs["Sampler"] == "DPM++ 2M"
    assert pairs["Schedule type"] == "Karras"
    assert pairs["CFG scale"] == "4.5"
    assert pairs["Seed"] == "11"
    assert pairs["Size"] == "72x64"
    assert pairs["RNG"] == "CPU"
    assert pairs["Model"] == base.name


def test_adapters_are_tags_with_hashes(tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "my_style.safetensors"
    file.write_bytes(b"weights")
    request = Request("a cat", 1, model="sd_xl_base_1.0.safetensors", loras=(f"{file}:0.8",))
    text = metadata.infotext(request, metadata.hashes(request, {}))
    assert CIVITAI.findall(text) == [("lora", "my_style", "0.8")]
    assert f'Lora hashes: "my_style: {hashlib.sha256(b"weights").hexdigest()[:12]}"' in text
    assert "Model: sd_xl_base_1.0" in text


def test_comfyui_s_graph_is_whole(tmp_path: Path) -> None:
    """Every link leads to a node that is there, and the sampler has what it needs."""
    file = tmp_path / "my_style.safetensors"
    file.write_bytes(b"weights")
    request = Request(
        "a cat", 7, "a dog", 30, 6.0, sampler="Euler a", loras=(f"{file}:0.5",), clip_skip=1, model="base.safetensors",
        original_size=(512, 768), prompt_2="a tabby", image="x/start.png", mask="x/mask.png", strength=0.4,
    )  # fmt: skip
    nodes = metadata.graph(request)
    for node in nodes.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in nodes
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert by_kind["KSampler"]["sampler_name"] == "euler_ancestral"
    assert by_kind["KSampler"]["scheduler"] == "normal"
    assert by_kind["KSampler"]["denoise"] == 0.4
    assert by_kind["KSampler"]["seed"] == 7
    assert by_kind["CLIPSetLastLayer"]["stop_at_clip_layer"] == -1
    assert by_kind["LoraLoader"]["lora_name"] == "my_style.safetensors"
    assert by_kind["SetLatentNoiseMask"]
    encoded = [n["inputs"] for n in nodes.values() if n["class_type"] == "CLIPTextEncodeSDXL"]
    assert [(e["text_l"], e["text_g"]) for e in encoded] == [("a cat", "a tabby"), ("a dog", "a dog")]
    assert encoded[0]["width"] == 768
    assert encoded[0]["height"] == 512
    assert by_kind["SaveImage"]


def test_a_picture_is_drawn_again_from_itself(base: Path, tmp_path: Path) -> None:
    first = drawn(base, tmp_path / "first", prompt_2="a green square", crop=(4, 8))
    (again,) = sample.run(order.made(None, {}, like=first), tmp_path / "again")
    assert same(first, again)
    assert texts(first) == texts(again)
    (other,) = sample.run(order.made(None, {"seed": 12}, like=first), tmp_path / "other")
    assert not same(first, other), "what is given beside it wins"


@pytest.mark.parametrize("key", ["parameters", "prompt"])
def test_a_picture_is_drawn_again_from_what_others_read(base: Path, tmp_path: Path, key: str) -> None:
    """A1111's text and ComfyUI's graph by themselves say enough; of the graph no guidance rescale is read."""
    first = drawn(base, tmp_path / "first", rescale=0.0 if key == "prompt" else 0.5, emphasis="a1111")
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text(key, texts(first)[key])
    with Image.open(first) as image:
        image.save(tmp_path / "only.png", pnginfo=chunks)
    (again,) = sample.run(order.made(str(base), {}, like=tmp_path / "only.png"), tmp_path / "again")
    assert same(first, again)


def test_a1111_s_own_pictures_are_read(tmp_path: Path) -> None:
    text = (
        "masterpiece, (a cat:1.2) <lora:style:0.7>\nin the rain\nNegative prompt: bad,\nworse\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Seed: 42, Size: 832x1216, "
        'Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Lora hashes: "style: 0123", Version: v1.10.1'
    )
    found = metadata.read_infotext(text, "x")
    assert found["prompt"] == "masterpiece, (a cat:1.2) \nin the rain"
    assert found["negative"] == "bad,\nworse"
    assert found["loras"] == ("style.safetensors:0.7",)
    assert (found["steps"], found["sampler"], found["width"], found["height"]) == ("20", "DPM++ 2M", "832", "1216")
    picture = Image.new("RGB", (8, 8))
    exif = picture.getexif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert metadata.read(tmp_path / "a.jpg") == found
    with pytest.raises(UserError, match=r"drawn with 'style\.safetensors', which is not here"):
        order.made("base", {}, like=tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "there is no file"),
        (b"nothing", "no picture"),
        ({}, "does not say how it was drawn"),
        ({"sdxl_trainer": "{"}, "is damaged"),
        ({"sdxl_trainer": "[]"}, "is damaged"),
        ({"prompt": "[1]"}, "does not say"),
        ({"prompt": '{"1": {"class_type": "KSampler", "inputs": {"positive": ["9", 0]}}}'}, "does not say"),
        ({"sdxl_trainer": json.dumps({"prompt": "a", "nonsense": 1})}, "there is no setting 'nonsense'"),
        ({"sdxl_trainer": json.dumps({"prompt": "a", "steps": "many"})}, "is not a whole number"),
    ],
)
def test_pictures_that_cannot_be_repeated_say_why(tmp_path: Path, content: Any, what: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    path = tmp_path / "a.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        chunks = PngInfo()
        for key, text in content.items():
            chunks.add_text(key, text)
        Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    with pytest.raises(UserError, match=what):
        order.made("base", {}, like=path)


def test_pictures_during_training_say_it_too(config: Any, tmp_path: Path) -> None:
    output = train(config(validation={"prompts": ["a red circle"], "images": 1, "steps": 2}, train={"steps": 1}))
    path = output / "samples" / "step-000001" / "0-0.png"
    assert "Steps: 2" in texts(path)["parameters"]
    (again,) = sample.run(order.made(None, {}, like=path), tmp_path / "again")
    with Image.open(path) as one, Image.open(again) as two:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(two)).max() <= 1
