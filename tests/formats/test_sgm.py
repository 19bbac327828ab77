"""The original tensor layout: names and shapes of the published file, and every value back where it came from."""

import pytest
import torch
from torch import Tensor

from sdxl_trainer.blueprint import SIZES, configs
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import modules, sgm
from sdxl_trainer.formats.folder import published_names

# Names and shapes in sd_xl_base_1.0.safetensors, at the places where the layout is not obvious.
PUBLISHED = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    "model.diffusion_model.input_blocks.2.0.emb_layers.1.weight": (320, 1280),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.0.0.in_layers.2.weight": (1280, 2560, 3, 3),
    "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
    "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.mid.attn_1.norm.weight": (512,),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.norm_out.weight": (512,),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_proj.weight": (1280, 5120),
    "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
    "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    "conditioner.embedders.1.model.ln_final.bias": (1280,),
    "conditioner.embedders.1.model.text_projection": (1280, 1280),
    "conditioner.embedders.1.model.logit_scale": (),
}


def weights(component: str, size: str, device: str) -> dict[str, Tensor]:
    with torch.device(device):
        module = modules.construct(component, configs(SIZES[size])[component])
    return dict(module.state_dict())


def test_names_and_shapes_of_the_published_file() -> None:
    whole: dict[str, Tensor] = {}
    counts = {}
    for component in sgm.PREFIX:
        part = sgm.to_sgm(component, weights(component, "sdxl", "meta"))
        counts[component] = len(part)
        whole |= part
    # The published file has 2,515 tensors; the one more is `position_ids`, which is not a weight.
    assert counts == {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 390}
    assert {name: tuple(whole[name].shape) for name in PUBLISHED} == PUBLISHED
    numbers = sum(tensor.numel() for tensor in whole.values())
    assert numbers == 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840 + 1  # the last is logit_scale


def test_names_as_diffusers_converts_them() -> None:
    """diffusers' own conversion of the same names gives the names that ours came from."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    for component, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        before = weights(component, "sdxl", "meta")
        after = convert(sgm.to_sgm(component, before), configs(SIZES["sdxl"])[component])
        assert {name: tensor.shape for name, tensor in after.items()} == {
            name: tensor.shape for name, tensor in before.items()
        }


@pytest.mark.parametrize("component", list(sgm.PREFIX))
@pytest.mark.parametrize("size", ["tiny", "mid"])
def test_there_and_back(component: str, size: str) -> None:
    """Every value returns to its name; the four components share one dict, as in a file."""
    before = published_names(component, weights(component, size, "meta" if size == "mid" else "cpu"))
    others = {"model.diffusion_model_ema.x": torch.zeros(1), "conditioner.embedders.0.modelx": torch.zeros(1)}
    file = {**others, **sgm.to_sgm(component, before)}
    after = sgm.from_sgm(component, file)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape, name
        assert tensor.is_meta or torch.equal(after[name], tensor), name
    for other in sgm.PREFIX.keys() - {component}:
        assert sgm.from_sgm(other, file) == {}


def test_projections_are_stacked_and_transposed() -> None:
    before = weights("text_encoder_2", "tiny", "cpu")
    file = sgm.to_sgm("text_encoder_2", before)
    prefix, layer = sgm.PREFIX["text_encoder_2"], "text_model.encoder.layers.1.self_attn"
    stacked = file[prefix + "transformer.resblocks.1.attn.in_proj_weight"]
    hidden = before[f"{layer}.q_proj.weight"].shape[1]
    for index, which in enumerate("qkv"):
        rows = stacked[index * hidden : (index + 1) * hidden]
        assert torch.equal(rows, before[f"{layer}.{which}_proj.weight"])
    x = torch.randn(3, hidden)
    projected = torch.nn.functional.linear(x, before["text_projection.weight"])
    torch.testing.assert_close(x @ file[prefix + "text_projection"], projected)


def test_first_text_encoder_of_either_transformers() -> None:
    """transformers 5 names its tensors without `text_model.`, transformers 4 and published files with it."""
    new = weights("text_encoder", "tiny", "cpu")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in new.items()}
    old = {f"text_model.{name}": tensor for name, tensor in bare.items()}
    assert sgm.to_sgm("text_encoder", bare).keys() == sgm.to_sgm("text_encoder", old).keys()
    assert all(".transformer.text_model." in name for name in sgm.to_sgm("text_encoder", bare))


def test_counters_are_dropped() -> None:
    prefix = sgm.PREFIX["text_encoder"]
    file = sgm.to_sgm("text_encoder", weights("text_encoder", "tiny", "cpu"))
    file[prefix + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    assert "text_model.embeddings.position_ids" not in sgm.from_sgm("text_encoder", file)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2"])
def test_foreign_tensors_are_refused_by_name(component: str) -> None:
    file = sgm.to_sgm(component, weights(component, "tiny", "cpu"))
    file[sgm.PREFIX[component] + "adapter.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"adapter\.weight"):
        sgm.from_sgm(component, file)
