"""The original (SGM) tensor layout of SDXL <-> the layout of the diffusers components: names and shapes only.

Sources: the modules of Stability-AI/generative-models (`openaimodel.UNetModel`, `model.Encoder`, `model.Decoder`)
and of OpenCLIP. Every module has one name in each layout; the tables below list those pairs, and both directions
read the same table. Nothing depends on widths or depths: the number of levels and layers follows from the names.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.formats.folder import published_names

Weights = Mapping[str, Tensor]

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
# Entries that the original layout has and diffusers has not: `position_ids` counts 0..76, and `logit_scale`
# belongs to CLIP's training loss. The value is that of OpenCLIP bigG, as other trainers write it.
IGNORED = ("text_model.embeddings.position_ids", "logit_scale")
LOGIT_SCALE = 4.6055

# Names inside one module: diffusers -> SGM.
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
CLIP_LAYERS, OPEN_CLIP_LAYERS = "text_model.encoder.layers", "transformer.resblocks"
CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def to_sgm(component: str, weights: Weights) -> dict[str, Tensor]:
    """One component's state dict in the original layout, with its prefix."""
    converted = _TO[component](published_names(component, weights))
    return {PREFIX[component] + name: tensor for name, tensor in converted.items()}


def from_sgm(component: str, weights: Weights) -> dict[str, Tensor]:
    """One component's state dict under its published diffusers names, from a whole file in the original layout.

    Empty if the file does not hold the component.
    """
    prefix = PREFIX[component]
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    own = {name: tensor for name, tensor in own.items() if name not in IGNORED}
    return _FROM[component](own) if own else {}


def unet_modules(levels: int, layers: int) -> dict[str, str]:
    """Module names of the UNet, diffusers -> SGM.

    In SGM a flat list holds the input: the first convolution, then for each level its layers and a downsampler.
    The output list has one layer more per level, and each upsampler sits behind its level's last attention.
    """
    table = dict(UNET_ENDS)
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    table["mid_block.attentions.0"] = "middle_block.1"
    for level in range(levels):
        first = level * (layers + 1)
        for layer in range(layers):
            resnets[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer + 1}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer + 1}.1"
        for layer in range(layers + 1):
            resnets[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.2.conv"
    return table | _inside(resnets, UNET_RESNET)


def vae_modules(levels: int, layers: int) -> dict[str, str]:
    """Module names of the autoencoder, diffusers -> SGM. SGM counts the decoder's levels from the pixels up."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets: dict[str, str] = {}
    attentions: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        attentions[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        resnets |= {f"{half}.mid_block.resnets.{index}": f"{half}.mid.block_{index + 1}" for index in (0, 1)}
    for level in range(levels):
        mirrored = levels - 1 - level
        for layer in range(layers):
            resnets[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        for layer in range(layers + 1):
            resnets[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{mirrored}.block.{layer}"
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{mirrored}.upsample.conv"
    return table | _inside(resnets, VAE_RESNET) | _inside(attentions, VAE_ATTENTION)


def _unet_to(weights: Weights) -> dict[str, Tensor]:
    levels, layers = _count(weights, "down_blocks.{}."), _count(weights, "down_blocks.0.resnets.{}.")
    return _renamed("UNet", weights, unet_modules(levels, layers))


def _unet_from(weights: Weights) -> dict[str, Tensor]:
    # The last level has no downsampler, so one level more than there are `op`s; levels * (layers + 1) blocks.
    levels = 1 + sum(name.endswith(".0.op.weight") for name in weights)
    layers = _count(weights, "input_blocks.{}.") // levels - 1
    return _renamed("UNet", weights, _inverse(unet_modules(levels, layers)))


def _vae_to(weights: Weights) -> dict[str, Tensor]:
    levels = _count(weights, "encoder.down_blocks.{}.")
    layers = _count(weights, "encoder.down_blocks.0.resnets.{}.")
    renamed = _renamed("VAE", weights, vae_modules(levels, layers))
    return {name: tensor[..., None, None] if _vae_linear(name) else tensor for name, tensor in renamed.items()}


def _vae_from(weights: Weights) -> dict[str, Tensor]:
    levels, layers = _count(weights, "encoder.down.{}."), _count(weights, "encoder.down.0.block.{}.")
    # [c, c, 1, 1] -> [c, c]; some files hold the attention as matrices already, and reshaping leaves those alone.
    flat = {name: tensor.reshape(tensor.shape[:2]) if _vae_linear(name) else tensor for name, tensor in weights.items()}
    return _renamed("VAE", flat, _inverse(vae_modules(levels, layers)))


def _vae_linear(name: str) -> bool:
    """Whether an SGM name is a weight of the attention, which SGM stores as a 1x1 convolution."""
    return ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name


def _clip_modules(layers: int) -> dict[str, str]:
    """Names of the second text encoder without its queries, keys and values, transformers -> OpenCLIP."""
    blocks = {f"{CLIP_LAYERS}.{index}": f"{OPEN_CLIP_LAYERS}.{index}" for index in range(layers)}
    return CLIP_ENDS | _inside(blocks, CLIP_LAYER)


def _clip_to(weights: Weights) -> dict[str, Tensor]:
    rest: dict[str, Tensor] = {}
    joined: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, found, kind = name.partition(".self_attn.q_proj.")
        if found:
            parts = [weights[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            block = layer.replace(CLIP_LAYERS, OPEN_CLIP_LAYERS)
            joined[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif not (".k_proj." in name or ".v_proj." in name):
            rest[name] = tensor
    renamed = _renamed("text encoder 2", rest, _clip_modules(_count(weights, CLIP_LAYERS + ".{}.")))
    if "text_projection" in renamed:
        renamed["text_projection"] = renamed["text_projection"].T  # OpenCLIP multiplies x @ W, a Linear x @ W.T
    some = next(iter(weights.values()))
    return renamed | joined | {"logit_scale": torch.tensor(LOGIT_SCALE, dtype=some.dtype, device=some.device)}


def _clip_from(weights: Weights) -> dict[str, Tensor]:
    rest: dict[str, Tensor] = {}
    split: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        block, found, kind = name.partition(".attn.in_proj_")
        if found:
            layer = block.replace(OPEN_CLIP_LAYERS, CLIP_LAYERS)
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {f"{layer}.self_attn.{which}_proj.{kind}": part for which, part in parts}
        else:
            rest[name] = tensor
    renamed = _renamed("text encoder 2", rest, _inverse(_clip_modules(_count(weights, OPEN_CLIP_LAYERS + ".{}."))))
    if "text_projection.weight" in renamed:
        renamed["text_projection.weight"] = renamed["text_projection.weight"].T
    return renamed | split


def _same(weights: Weights) -> dict[str, Tensor]:
    """The first text encoder has its transformers names in both layouts."""
    return dict(weights)


def _inside(modules: Mapping[str, str], parts: Mapping[str, str]) -> dict[str, str]:
    """The names of the parts of each module."""
    return {f"{a}.{c}": f"{b}.{d}" for a, b in modules.items() for c, d in parts.items()}


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {target: source for source, target in table.items()}


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers stand in the place of `{}` in names that begin like the pattern."""
    start, end = pattern.split("{}")
    numbers = {name.removeprefix(start).split(end, 1)[0] for name in names if name.startswith(start)}
    return len(numbers)


def _renamed(what: str, weights: Weights, table: Mapping[str, str]) -> dict[str, Tensor]:
    """Each tensor under its new name: the longest beginning that is in the table is replaced."""
    result: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in weights.items():
        parts = name.split(".")
        beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found = next((beginning for beginning in beginnings if beginning in table), None)
        if found is None:
            unknown.append(name)
        else:
            result[table[found] + name.removeprefix(found)] = tensor
    if unknown:
        raise UserError(
            f"{plural(len(unknown), 'tensor does', 'tensors do')} not belong to an SDXL {what}",
            shortened(unknown, 3),
            "use a model with the architecture of SDXL base 1.0; refiners and other models are not supported",
        )
    return result


_TO = {"unet": _unet_to, "vae": _vae_to, "text_encoder": _same, "text_encoder_2": _clip_to}
_FROM = {"unet": _unet_from, "vae": _vae_from, "text_encoder": _same, "text_encoder_2": _clip_from}
