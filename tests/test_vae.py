"""The VAE's encoder against the library's, bit by bit, and what is left to the library."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from sdxl_trainer import base as bases
from sdxl_trainer import blueprint, vae
from sdxl_trainer.config import Model
from sdxl_trainer.errors import UserError

CPU = torch.device("cpu")
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A base of its own, to be changed."""
    shutil.copytree(base, tmp_path / "base")
    return tmp_path / "base"


def set_config(place: Path, **changes: Any) -> None:
    path = place / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def loaded(place: Path, dtype: torch.dtype = torch.float32) -> Any:
    return vae.load(bases.resolve(Model(path=str(place)), place.parent), dtype, CPU)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 2}, {"mid_block_add_attention": False}], ids=str)
def test_latents_are_those_of_the_library_bit_by_bit(place: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    set_config(place, **changes)
    torch.manual_seed(0)
    AutoencoderKL.from_config(json.loads((place / "vae/config.json").read_text())).save_pretrained(place / "vae")
    theirs = AutoencoderKL.from_pretrained(place / "vae", torch_dtype=dtype).eval()
    ours = loaded(place, dtype)
    assert isinstance(ours, vae.Encoder)
    assert ours.dtype == dtype
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    pixels = torch.rand(2, 3, 72, 64).to(dtype) * 2 - 1
    wanted, found = theirs.encode(pixels).latent_dist, ours.encode(pixels).latent_dist
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.std, wanted.std)


def test_full_size_has_the_library_s_names_and_shapes() -> None:
    config = blueprint.configs(blueprint.SIZES["sdxl"])["vae"]
    assert vae.fits(config)
    with torch.device("meta"):
        theirs, ours, rest = AutoencoderKL.from_config(config), vae.Encoder(config), vae.decoder(config)
    shapes = {name: tensor.shape for name, tensor in (ours.state_dict() | rest.state_dict()).items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


def test_what_is_not_known_is_left_to_the_library(place: Path) -> None:
    set_config(place, something_new=1)
    assert isinstance(loaded(place), AutoencoderKL)


@pytest.mark.parametrize("changes", [{"act_fn": "gelu"}, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}], ids=str)
def test_another_architecture_does_not_fit(changes: dict[str, Any]) -> None:
    assert not vae.fits({**blueprint.configs(blueprint.SIZES["tiny"])["vae"], **changes})


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "decoder.conv_out.bias"])
@pytest.mark.parametrize("damage", ["lacks", "not finite"])
def test_damaged_weights_are_refused_before_anything_is_encoded(place: Path, name: str, damage: str) -> None:
    weights = load_file(place / WEIGHTS)
    values = weights.pop(name)
    if damage == "not finite":
        weights[name] = torch.full_like(values, float("nan"))
    save_file(weights, place / WEIGHTS)
    with pytest.raises(UserError, match="lack" if damage == "lacks" else damage) as refused:
        loaded(place)
    assert name in refused.value.what
