"""A UNet from random weights, of the base's sizes or of others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_trainer import configfile, files, untrained
from sdxl_trainer.base import resolve
from sdxl_trainer.config import Config, Model
from sdxl_trainer.errors import UserError
from sdxl_trainer.train import train

SIZES = {
    "block_out_channels": [16, 32, 48],
    "attention_head_dim": [1, 2, 3],
    "transformer_layers_per_block": [1, 1, 2],
    "norm_num_groups": 16,
    "addition_time_embed_dim": 8,
}
RANDOM = {"init": "random", "unet": SIZES}


@pytest.fixture
def without_unet(base: Path, tmp_path: Path) -> Path:
    """The base, and no UNet in it."""
    shutil.copytree(base, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "unet")
    return tmp_path / "parts"


def weights(output: Path) -> str:
    return files.sha256(output / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_has_the_sizes_of_its_config_and_goes_on_after_an_interruption(
    config: Callable[..., Config], without_unet: Path, tmp_path: Path
) -> None:
    model = RANDOM | {"path": str(without_unet)}
    straight = train(config(model=model, output_dir=str(tmp_path / "straight"), validation={"prompts": ["a circle"]}))
    train(config(model=model, train={"steps": 2}))
    resumed = train(config(model=model))
    assert weights(resumed) == weights(straight)
    pipeline = StableDiffusionXLPipeline.from_pretrained(straight, add_watermarker=False)
    found = json.loads(json.dumps(dict(pipeline.unet.config)))
    assert found | SIZES == found
    encoders = pipeline.text_encoder.config, pipeline.text_encoder_2.config
    assert found["cross_attention_dim"] == sum(encoder.hidden_size for encoder in encoders)
    assert found["projection_class_embeddings_input_dim"] == encoders[1].projection_dim + 6 * 8
    again = configfile.load(straight / "config.toml")
    assert again.model.unet is not None
    assert list(again.model.unet.block_out_channels or ()) == SIZES["block_out_channels"]
    with pytest.raises(UserError, match="attention_head_dim"):
        train(config(model=model | {"unet": SIZES | {"attention_head_dim": [1, 1, 1]}}))


def test_the_weights_follow_from_the_seed(base: Path) -> None:
    found = resolve(Model(path=str(base), init="random"), base.parent).config("unet")
    first, same, other = (dict(untrained.make(found, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    drawn = [name for name, weight in first.items() if weight.std() > 0]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    before = torch.get_rng_state()
    untrained.make(found, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_caption_says_keeps_its_size_on_the_way_into_a_block(base: Path) -> None:
    """Queries, keys and values of the captions, and the embedding of time and sizes, are neither lost nor blown up."""
    made = untrained.make(resolve(Model(path=str(base), init="random"), base.parent).config("unet"), 0)
    noise = torch.Generator().manual_seed(0)
    layers = {name: layer for name, layer in made.named_modules() if name.endswith(("attn2.to_v", "attn2.to_k"))}
    assert layers
    for layer in layers.values():
        said = torch.randn(64, layer.in_features, generator=noise)
        assert layer(said).std().item() == pytest.approx(1.0, rel=0.25)
    assert made.conv_out.weight.abs().max() == 0


def test_sdxl_s_own_sizes_stand_in_for_a_unet_that_is_not_there(without_unet: Path) -> None:
    found = resolve(Model(path=str(without_unet), init="random"), without_unet).config("unet")
    assert found["block_out_channels"] == [320, 640, 1280]
    encoders = [
        json.loads((without_unet / name / "config.json").read_text()) for name in ("text_encoder", "text_encoder_2")
    ]
    assert found["cross_attention_dim"] == sum(encoder["hidden_size"] for encoder in encoders)
    with pytest.raises(UserError, match="no 'unet'"):
        resolve(Model(path=str(without_unet)), without_unet)


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"block_out_channels": [32, 64]}, "has 2 numbers, and the base's UNet has 3 levels"),
        ({"transformer_layers_per_block": [1]}, "has 1 number, and"),
        ({"block_out_channels": [32, 64, 72]}, "72 channels cannot be divided by norm_num_groups = 16"),
        ({"attention_head_dim": [1, 3, 4]}, "64 channels cannot be divided by attention_head_dim = 3"),
        ({"addition_time_embed_dim": 7}, "is odd"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(base: Path, sizes: dict[str, Any], what: str) -> None:
    options = Model.model_validate_json(json.dumps({"path": str(base), "init": "random", "unet": sizes}))
    with pytest.raises(UserError, match=what):
        resolve(options, base.parent)
