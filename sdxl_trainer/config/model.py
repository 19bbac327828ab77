"""The base model, how captions are read, and where encoded things are kept."""

from typing import Literal

from pydantic import Field

from sdxl_trainer.config.section import Fraction, PathText, Positive, Section, Text, option


class UNet(Section):
    """Sizes of a UNet from random weights, by the names of its config.json; what is not given is as in the base."""

    block_out_channels: tuple[Positive, ...] | None = option(None, "channels of each level")
    layers_per_block: Positive | None = option(None, "residual blocks of each level on the way down; one more upwards")
    transformer_layers_per_block: tuple[Positive, ...] | None = option(
        None, "transformer layers of each attention block, by level"
    )
    attention_head_dim: tuple[Positive, ...] | None = option(
        None, "attention heads of each level (SDXL's config has their number under this name)"
    )
    norm_num_groups: Positive | None = option(None, "groups of the group normalisation")
    addition_time_embed_dim: Positive | None = option(
        None, "numbers that each of the six sizes and crop coordinates becomes"
    )
    sample_size: Positive | None = option(None, "side of the latents, an eighth of the picture's, drawn by default")


class Model(Section):
    path: PathText = Field(description="hub id, diffusers folder, or one .safetensors file")
    revision: Text = option(None, "branch, tag or commit of the hub repository")
    variant: Text = option(None, "file variant such as fp16")
    vae: PathText | None = option(None, "another VAE: hub id or folder, for example madebyollin/sdxl-vae-fp16-fix")
    vae_revision: Text = option(None, "branch, tag or commit of the VAE's repository")
    configs: PathText | None = option(
        None, "diffusers folder with the configs of a single file that is not full-size SDXL"
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "random: the UNet begins with random weights; its own in the base are not needed"
    )
    unet: UNet | None = option(
        None, "sizes of a UNet from random weights, by the names of its config.json; default: the base's"
    )
    attention: Literal["sdpa", "xformers", "npu"] = option("sdpa", "attention kernel; sdpa is the fastest or equal")


class TextOptions(Section):
    dropped_caption: Literal["pipeline", "empty", "zeros"] = option(
        "pipeline", "what a dropped caption becomes: the embedding of '', zeros, or what the model's own pipeline uses"
    )
    long_captions: Literal["a1111", "comfyui", "kohya", "cut"] = option(
        "a1111", "captions of more than 75 tokens: chunks cut and joined as that program does, or cut off"
    )
    max_chunks: int = option(3, "chunks of 75 tokens that a caption may have; what is longer is cut off", ge=1, le=12)
    emphasis: Literal["off", "a1111", "a1111_no_norm", "comfyui"] = option(
        "off", "how (word:1.2) is read in validation prompts, and in captions of data sets with emphasis = true"
    )
    clip_skip: int = option(2, "layer of both encoders that is read, counted from the end: 1 is the last", ge=1)
    drop_encoder_1: Fraction = option(0.0, "how often the first text encoder's part of a caption is left out")
    drop_encoder_2: Fraction = option(0.0, "how often the second encoder's part and pooled output are left out")
    cache: bool = option(True, "false: frozen text encoders stay in memory and encode captions in the step")


class Inpainting(Section):
    masks_per_image: Positive = option(4, "drawn masks kept in the cache per picture and crop (inpainting models)")
    whole: Fraction = option(0.25, "how often the mask hides the whole picture")
    strokes: Fraction = option(0.5, "of the other masks, how many are strokes of a brush; the rest are boxes")


class Cache(Section):
    path: PathText | None = option(None, "folder of cached latents and embeddings; default: <output_dir>/cache")
    mirror: PathText | None = option(
        None,
        "folder or fsspec address (s3://bucket/cache) that `sdxl cache --push` fills: rows not in path are read there",
    )
    batch_size: Positive = option(4, "pictures per forward pass of the VAE; fewer of more than 512 x 512 pixels")
    text_batch_size: Positive = option(8, "captions per forward pass of the text encoders")
    vae_precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "type in which the VAE encodes")
    workers: int | None = option(None, "processes that decode pictures; default: one per core, at most 8", ge=0)
    datasets_dir: PathText | None = option(None, "where hub datasets are kept")
