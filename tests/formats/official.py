"""Names and shapes of `sd_xl_base_1.0.safetensors`, made from the published architecture alone.

Written from `configs/inference/sd_xl_base.yaml` and the constructors that it names in Stability-AI/generative-models
(`openaimodel.UNetModel`, `attention.SpatialTransformer`, `model.Encoder`, `model.Decoder`), from OpenCLIP's text tower
for ViT-bigG-14 and from transformers' CLIP-L: this walks through the blocks as they do, and knows nothing of diffusers.
"""

from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]

CONTEXT, ADM, WIDTH, DEPTHS, MULTIPLIERS, LAYERS = 2048, 2816, 320, (1, 2, 10), (1, 2, 4), 2
ATTENTION_AT = (2, 4)  # down-sampling factors at which there is attention
VAE_WIDTH, VAE_MULTIPLIERS = 128, (1, 2, 4, 4)


def linear(name: str, inner: int, outer: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outer, inner)} | ({f"{name}.bias": (outer,)} if bias else {})


def conv(name: str, inner: int, outer: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outer, inner, kernel, kernel), f"{name}.bias": (outer,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def res_block(name: str, inner: int, outer: int) -> Shapes:
    shapes = norm(f"{name}.in_layers.0", inner) | conv(f"{name}.in_layers.2", inner, outer)
    shapes |= linear(f"{name}.emb_layers.1", 4 * WIDTH, outer)
    shapes |= norm(f"{name}.out_layers.0", outer) | conv(f"{name}.out_layers.3", outer, outer)
    return shapes | (conv(f"{name}.skip_connection", inner, outer, 1) if inner != outer else {})


def attention(name: str, width: int, context: int) -> Shapes:
    shapes = linear(f"{name}.to_q", width, width, bias=False)
    shapes |= linear(f"{name}.to_k", context, width, bias=False) | linear(f"{name}.to_v", context, width, bias=False)
    return shapes | linear(f"{name}.to_out.0", width, width)


def spatial_transformer(name: str, width: int, depth: int) -> Shapes:
    shapes = norm(f"{name}.norm", width) | linear(f"{name}.proj_in", width, width)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        shapes |= attention(f"{block}.attn1", width, width) | attention(f"{block}.attn2", width, CONTEXT)
        shapes |= linear(f"{block}.ff.net.0.proj", width, 8 * width) | linear(f"{block}.ff.net.2", 4 * width, width)
        for number in (1, 2, 3):
            shapes |= norm(f"{block}.norm{number}", width)
    return shapes | linear(f"{name}.proj_out", width, width)


def unet() -> Shapes:
    shapes = linear("time_embed.0", WIDTH, 4 * WIDTH) | linear("time_embed.2", 4 * WIDTH, 4 * WIDTH)
    shapes |= linear("label_emb.0.0", ADM, 4 * WIDTH) | linear("label_emb.0.2", 4 * WIDTH, 4 * WIDTH)
    shapes |= conv("input_blocks.0.0", 4, WIDTH)
    kept, width, number, factor = [WIDTH], WIDTH, 1, 1
    for level, multiplier in enumerate(MULTIPLIERS):
        for _ in range(LAYERS):
            shapes |= res_block(f"input_blocks.{number}.0", width, multiplier * WIDTH)
            width = multiplier * WIDTH
            if factor in ATTENTION_AT:
                shapes |= spatial_transformer(f"input_blocks.{number}.1", width, DEPTHS[level])
            kept.append(width)
            number += 1
        if level < len(MULTIPLIERS) - 1:
            shapes |= conv(f"input_blocks.{number}.0.op", width, width)
            kept.append(width)
            number, factor = number + 1, 2 * factor
    shapes |= res_block("middle_block.0", width, width) | res_block("middle_block.2", width, width)
    shapes |= spatial_transformer("middle_block.1", width, DEPTHS[-1])
    number = 0
    for level, multiplier in reversed(list(enumerate(MULTIPLIERS))):
        for layer in range(LAYERS + 1):
            shapes |= res_block(f"output_blocks.{number}.0", width + kept.pop(), multiplier * WIDTH)
            width, behind = multiplier * WIDTH, 1
            if factor in ATTENTION_AT:
                shapes |= spatial_transformer(f"output_blocks.{number}.1", width, DEPTHS[level])
                behind = 2
            if level and layer == LAYERS:
                shapes |= conv(f"output_blocks.{number}.{behind}.conv", width, width)
                factor //= 2
            number += 1
    return shapes | norm("out.0", width) | conv("out.2", width, 4)


def vae_block(name: str, inner: int, outer: int) -> Shapes:
    shapes = norm(f"{name}.norm1", inner) | conv(f"{name}.conv1", inner, outer)
    shapes |= norm(f"{name}.norm2", outer) | conv(f"{name}.conv2", outer, outer)
    return shapes | (conv(f"{name}.nin_shortcut", inner, outer, 1) if inner != outer else {})


def vae_middle(name: str, width: int) -> Shapes:
    shapes = vae_block(f"{name}.block_1", width, width) | vae_block(f"{name}.block_2", width, width)
    shapes |= norm(f"{name}.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.attn_1.{part}", width, width, 1)
    return shapes


def vae() -> Shapes:
    shapes = conv("encoder.conv_in", 3, VAE_WIDTH)
    width, last = VAE_WIDTH, len(VAE_MULTIPLIERS) - 1
    for level, multiplier in enumerate(VAE_MULTIPLIERS):
        for layer in range(LAYERS):
            shapes |= vae_block(f"encoder.down.{level}.block.{layer}", width, multiplier * VAE_WIDTH)
            width = multiplier * VAE_WIDTH
        if level != last:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= vae_middle("encoder.mid", width) | norm("encoder.norm_out", width) | conv("encoder.conv_out", width, 8)
    shapes |= conv("quant_conv", 8, 8, 1) | conv("post_quant_conv", 4, 4, 1)
    shapes |= conv("decoder.conv_in", 4, width) | vae_middle("decoder.mid", width)
    for level, multiplier in reversed(list(enumerate(VAE_MULTIPLIERS))):
        for layer in range(LAYERS + 1):
            shapes |= vae_block(f"decoder.up.{level}.block.{layer}", width, multiplier * VAE_WIDTH)
            width = multiplier * VAE_WIDTH
        if level:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", width, width)
    return shapes | norm("decoder.norm_out", width) | conv("decoder.conv_out", width, 3)


def clip_l() -> Shapes:
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
    }
    for layer in range(12):
        name = f"text_model.encoder.layers.{layer}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= linear(f"{name}.self_attn.{part}", 768, 768)
        shapes |= linear(f"{name}.mlp.fc1", 768, 3072) | linear(f"{name}.mlp.fc2", 3072, 768)
        shapes |= norm(f"{name}.layer_norm1", 768) | norm(f"{name}.layer_norm2", 768)
    return shapes | norm("text_model.final_layer_norm", 768)


def open_clip_g() -> Shapes:
    shapes: Shapes = {
        "positional_embedding": (77, 1280),
        "text_projection": (1280, 1280),
        "logit_scale": (),
        "token_embedding.weight": (49408, 1280),
    }
    for layer in range(32):
        name = f"transformer.resblocks.{layer}"
        shapes |= {f"{name}.attn.in_proj_weight": (3840, 1280), f"{name}.attn.in_proj_bias": (3840,)}
        shapes |= linear(f"{name}.attn.out_proj", 1280, 1280) | norm(f"{name}.ln_1", 1280) | norm(f"{name}.ln_2", 1280)
        shapes |= linear(f"{name}.mlp.c_fc", 1280, 5120) | linear(f"{name}.mlp.c_proj", 5120, 1280)
    return shapes | norm("ln_final", 1280)


def whole() -> Shapes:
    """All weights of the file; it also has `position_ids`, a counter that no reader needs."""
    parts: Iterator[tuple[str, Shapes]] = iter(
        [
            ("model.diffusion_model.", unet()),
            ("first_stage_model.", vae()),
            ("conditioner.embedders.0.transformer.", clip_l()),
            ("conditioner.embedders.1.model.", open_clip_g()),
        ]
    )
    return {prefix + name: shape for prefix, shapes in parts for name, shape in shapes.items()}
