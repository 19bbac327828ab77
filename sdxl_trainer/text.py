"""Captions to what the UNet attends to: both tokenizers, both encoders, penultimate states, pooled output."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.formats import pretrained

PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and OpenCLIP bigG with their tokenizers, in this order."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[torch.nn.Module, torch.nn.Module]


def empty_encoders(base: Base) -> tuple[Any, Any]:
    """Both encoders with whatever weights their classes begin with (none on the meta device)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = (CLIPTextConfig.from_dict(base.config(part)) for part in PARTS)
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def tokenizers(base: Base) -> tuple[Any, Any]:
    """The tokenizers of both encoders; each pads as its own config says (EOS for the first, id 0 for the second)."""
    from transformers import CLIPTokenizer

    found = []
    for part in ("tokenizer", "tokenizer_2"):
        with pretrained.explained(base.part(part)):
            found.append(CLIPTokenizer.from_pretrained(base.part(part)))
    return found[0], found[1]


def load(base: Base, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """Both encoders with their tokenizers, frozen, in evaluation mode."""
    first, second = (encoder.to(device).eval().requires_grad_(False) for encoder in load_encoders(base, None, dtype))
    return TextEncoders(tokenizers(base), (first, second))


def load_encoders(base: Base, folder: Path | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Both encoders: of a checkpoint's folder if given, else of the base."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoders = []
    for part, model in zip(PARTS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        path, variant = (folder / part, None) if folder else (base.part(part), weights_file(base, part))
        encoders.append(pretrained.load(model, path, variant, dtype=dtype, ignore_mismatched_sizes=True))
    return encoders[0], encoders[1]


def overflows(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """How many tokens of each caption do not fit into the encoder's positions."""
    room = tokenizer.model_max_length
    ids = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
    return [max(0, len(sequence) - room) for sequence in ids]


def cut(tokenizers: tuple[Any, Any], captions: Sequence[str]) -> list[str]:
    """The captions that do not fit."""
    return [c for c, over in zip(captions, overflows(tokenizers[0], captions), strict=True) if over]


def token_ids(tokenizers: tuple[Any, Any], captions: Sequence[str]) -> Tensor:
    """Token ids [B, 2, 77] of captions, for the first and the second encoder, padded or cut."""
    both = [
        tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in tokenizers
    ]
    return torch.stack(both, dim=1)


def embed(encoders: tuple[Any, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [B, 77, 768 + 1280] and pooled output [B, 1280] of token ids [B, 2, 77], in the encoders' dtype.

    SDXL reads the states before the last layer of both encoders, without final norm, and the projected
    end-of-text state of the second (Podell et al. 2023, section 2.1).
    """
    outputs = [encoder(tokens[:, i], output_hidden_states=True) for i, encoder in enumerate(encoders)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1][0]


@torch.no_grad()
def encode(text: TextEncoders, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings and pooled output of captions."""
    device = next(text.encoders[0].parameters()).device
    return embed(text.encoders, token_ids(text.tokenizers, captions).to(device))


def parameter_names(base: Base) -> list[str]:
    """Names of the encoders' parameters as rules see them, without loading what they would be read from."""
    layer = [f"self_attn.{p}_proj" for p in "qkv"] + [
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm1",
        "layer_norm2",
    ]
    names = []
    for part in PARTS:
        layers = [f"encoder.layers.{i}.{m}" for i in range(base.config(part)["num_hidden_layers"]) for m in layer]
        modules = [f"{m}.{kind}" for m in [*layers, "final_layer_norm"] for kind in ("weight", "bias")]
        modules += ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
        # transformers 5 dropped the prefix of the first encoder's names.
        names += [f"{part}.{prefix}{name}" for prefix in ("", "text_model.") for name in modules]
    return [*names, "text_encoder_2.text_projection.weight"]
