"""Full-size SDXL: the single file is the official one in names and shapes; ComfyUI knows every name of an adapter."""

import re

import pytest
import torch
from torch import Tensor

from sdxl_trainer.blueprint import SIZES, configs
from sdxl_trainer.formats import lora, lora_names, modules, sgm
from sdxl_trainer.formats.folder import published_names
from tests.formats import comfyui, official

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, Tensor]]:
    """The published state dicts of full-size SDXL, without data."""
    found = {}
    for part in PARTS:
        with torch.device("meta"):
            found[part] = published_names(part, modules.construct(part, configs(SIZES["sdxl"])[part]).state_dict())
    return found


def matrices(full: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights that an adapter can stand beside: linear layers and convolutions, by module."""
    return {
        f"{part}.{name.removesuffix('.weight')}": weight
        for part in lora_names.KOHYA
        for name, weight in full[part].items()
        if weight.dim() in (2, 4) and "embedding.weight" not in name
    }


def test_the_table_is_that_of_the_published_file() -> None:
    """Checked on figures that were published: 2,515 tensors with the one counter, and the UNet's parameters."""
    shapes = official.whole()
    assert len(shapes) + 1 == 2515
    assert sum(torch.Size(shape).numel() for shape in official.unet().values()) == 2_567_463_684


def test_the_single_file_has_exactly_the_official_names_and_shapes(full: dict[str, dict[str, Tensor]]) -> None:
    made = {name: tuple(t.shape) for part in PARTS for name, t in sgm.to_sgm(part, full[part]).items()}
    assert made == official.whole()


def test_the_official_names_come_back_as_the_published_ones(full: dict[str, dict[str, Tensor]]) -> None:
    file = {name: torch.empty(shape, device="meta") for name, shape in official.whole().items()}
    for part in PARTS:
        assert {n: t.shape for n, t in sgm.from_sgm(part, file).items()} == {n: t.shape for n, t in full[part].items()}


def adapter(full: dict[str, dict[str, Tensor]], rank: int = 4, alpha: float = 2.0, dora: bool = True) -> lora.Adapter:
    """A DoRA on every matrix of SDXL, without data."""
    made = {}
    for name, weight in matrices(full).items():
        down = torch.empty(rank, *weight.shape[1:], device="meta")
        up = torch.empty(weight.shape[0], rank, *[1] * (weight.dim() - 2), device="meta")
        more = {"magnitude": torch.empty(weight.shape[0], device="meta")} if dora else {}
        made[name] = lora.Module("lora", {"lora_down": down, "lora_up": up, **more}, alpha)
    return lora.Adapter(made)


def test_comfyui_loads_every_name(full: dict[str, dict[str, Tensor]]) -> None:
    """0 names left over; and each goes to the weight it belongs to, told by the shapes in the official file."""
    whole = adapter(full)
    tensors = lora.kohya_tensors(whole)
    patches, left = comfyui.loaded(list(tensors))
    assert left == []
    assert len(patches) == len(whole.modules) == len(matrices(full)) > 1000
    shapes = official.whole()
    unet = {f"diffusion_model.{name}": shape for name, shape in official.unet().items()}
    for target, names in patches.items():
        assert len(names) == 4  # down, up, alpha, dora_scale
        module = names[0].split(".")[0]
        up, down, scale = (tensors[f"{module}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "dora_scale"))
        assert tensors[f"{module}.alpha"].item() == 2.0
        if target in unet:
            shape = unet[target]
        else:
            part = {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": ""}[target.split(".")[0]]
            bare = target.split(".transformer.")[1]
            shape = shapes.get(part + bare) or tuple(full["text_encoder_2"][bare].shape)
        assert (up.shape[0], *down.shape[1:]) == shape
        assert tuple(scale.shape) == (shape[0], *[1] * (len(shape) - 1))


def test_every_name_comes_back(full: dict[str, dict[str, Tensor]]) -> None:
    names = set(matrices(full))
    assert {lora_names.module(lora_names.kohya(name)) for name in names} == names
    assert len({lora_names.kohya(name) for name in names}) == len(names)
    # Other trainers write the UNet's diffusers path with '_' for '.', which ComfyUI reads too.
    flat = {
        name: "lora_unet_" + name.removeprefix("unet.").replace(".", "_") for name in names if name.startswith("unet.")
    }
    assert all(lora_names.module(other) == name for name, other in flat.items())


OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def aged(part: str, path: str) -> list[str]:
    """Names of a module's first matrix that files of other ages and programs have."""
    names = [f"{part}.{path}{end}" for end in (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")]
    if part == "unet":
        if re.search(r"attn[12]\.to_", path):  # attention processors, with and without the part's name
            old = re.sub(r"(attn[12])\.(to_[a-z]+)(\.0)?$", r"\1.processor.\2_lora.down.weight", path)
            names += [old, f"unet.{old}"]
        return [*names, f"base_model.model.{part}.{path}.lora_A.default.weight"]
    clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]
    names.append(f"text_encoders.{clip}.transformer.{path}.lora_down.weight")
    if path.startswith("text_model."):  # transformers 5 drops it
        names.append(f"{part}.{path.removeprefix('text_model.')}.lora_A.weight")
    before, _, last = path.rpartition(".")
    return [*names, f"{part}.{before}.{OLD_TEXT[last]}_lora.down.weight"] if last in OLD_TEXT else names


def test_names_of_any_age(full: dict[str, dict[str, Tensor]]) -> None:
    for name in matrices(full):
        for other in aged(*name.split(".", 1)):
            split = lora_names.split(other)
            assert split is not None, other
            assert (lora_names.module(split[0]), split[1]) == (name, "lora_down"), other
