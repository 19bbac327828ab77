"""Captions to what the UNet attends to: both tokenizers, both encoders, penultimate states, pooled output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.formats import pretrained


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and OpenCLIP bigG with their tokenizers, in this order."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[torch.nn.Module, torch.nn.Module]


def tokenizers(base: Base) -> tuple[Any, Any]:
    """The tokenizers of both encoders; each pads as its own config says (EOS for the first, id 0 for the second)."""
    from transformers import CLIPTokenizer

    found = []
    for part in ("tokenizer", "tokenizer_2"):
        with pretrained.explained(base.part(part)):
            found.append(CLIPTokenizer.from_pretrained(base.part(part)))
    return found[0], found[1]


def load(base: Base, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """Both encoders, frozen, in evaluation mode."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoders: list[Any] = []
    for part, model in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        encoder = pretrained.load(
            model, base.part(part), weights_file(base, part), dtype=dtype, ignore_mismatched_sizes=True
        )
        encoders.append(encoder.to(device).eval().requires_grad_(False))
    return TextEncoders(tokenizers(base), (encoders[0], encoders[1]))


def overflows(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """How many tokens of each caption do not fit into the encoder's positions."""
    room = tokenizer.model_max_length
    ids = tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
    return [max(0, len(sequence) - room) for sequence in ids]


@torch.no_grad()
def encode(text: TextEncoders, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, 77, 768 + 1280] and pooled output [B, 1280] of captions, in the encoders' dtype.

    SDXL reads the states before the last layer of both encoders, without final norm, and the projected
    end-of-text state of the second (Podell et al. 2023, section 2.1).
    """
    states, pooled = [], None
    for tokenizer, encoder in zip(text.tokenizers, text.encoders, strict=True):
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens.input_ids.to(next(encoder.parameters()).device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    assert pooled is not None
    return torch.cat(states, dim=-1), pooled
