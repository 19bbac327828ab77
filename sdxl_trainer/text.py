"""Prompts to what the UNet attends to: both tokenizers, both encoders, chunks of states, pooled output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import chunking, clip
from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.chunking import Prompt, Token
from sdxl_trainer.config import TextOptions
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.formats import pretrained
from sdxl_trainer.formats.folder import TOKENIZERS

# Prompts that are too long of which more is told than their number.
SHOWN = 3
PARTS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and OpenCLIP bigG with their tokenizers, in this order. For the refiner, which has no first encoder, the
    second tokenizer stands twice."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[torch.nn.Module | None, torch.nn.Module]


def empty_encoders(base: Base) -> tuple[Any, Any]:
    """Both encoders with whatever weights their classes begin with (none on the meta device)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made = []
    for part, kind in zip(PARTS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        made.append(kind(CLIPTextConfig.from_dict(base.config(part))) if part in base.encoders else None)
    return made[0], made[1]


def tokenizers(base: Base) -> tuple[Any, Any]:
    """The tokenizers of both encoders; each pads as its own config says (EOS for the first, id 0 for the second)."""
    from transformers import CLIPTokenizer

    found = []
    for part in TOKENIZERS if not base.refines else TOKENIZERS[1:]:
        with pretrained.explained(base.part(part)):
            found.append(CLIPTokenizer.from_pretrained(base.part(part)))
    return found[0], found[-1]


def load(base: Base, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """Both encoders with their tokenizers, frozen, in evaluation mode."""
    first, second = load_encoders(base, None, dtype)
    for _, encoder in present((first, second)):
        encoder.to(device).eval().requires_grad_(False)
    return TextEncoders(tokenizers(base), (first, second))


def load_to_encode(base: Base, dtype: torch.dtype, device: torch.device) -> TextEncoders:
    """As `load`, for `tokenize` and `encode_tokens` alone: what is known here comes without the library, whose import
    takes seconds."""
    readers = [clip.tokenizer(base.part(part)) for part in (TOKENIZERS if not base.refines else TOKENIZERS[1:])]
    encoders: list[Any] = [None, None]
    for number, part in enumerate(PARTS):
        if part in base.encoders:
            place, variant = base.part(part), weights_file(base, part)
            encoders[number] = clip.model(place, base.config(part), variant, dtype, device)
    if None in readers or any(encoders[PARTS.index(part)] is None for part in base.encoders):
        return load(base, dtype, device)
    return TextEncoders((readers[0], readers[-1]), (encoders[0], encoders[1]))


def load_encoders(base: Base, folder: Path | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Both encoders: of a checkpoint's folder if given, else of the base."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoders: list[Any] = []
    for part, model in zip(PARTS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        if part not in base.encoders:
            encoders.append(None)
            continue
        path, variant = (folder / part, None) if folder else (base.part(part), weights_file(base, part))
        encoders.append(pretrained.load(model, path, variant, dtype=dtype, ignore_mismatched_sizes=True))
    return encoders[0], encoders[1]


@dataclass(frozen=True)
class Tokens:
    """A prompt's n chunks: `ids` int32 [n, 2, 77] for both encoders; `weights` fp32 [n, 2, 77] if any is not 1;
    `lost` are the tokens of the first text, else of the second, that were cut off; `count` is how many the longer one
    had before."""

    ids: Tensor
    weights: Tensor | None
    lost: tuple[int, ...]
    count: int


def tokenize(tokenizers: tuple[Any, Any], prompts: Sequence[Prompt], options: TextOptions) -> list[Tokens]:
    """The chunks of each prompt: 75 tokens between begin and end of text, padded as each tokenizer does it."""
    if not prompts:
        return []
    read = []
    for prompt in prompts:
        style = chunking.EMPHASIS[options.emphasis if prompt.emphasis else "off"]
        read.append([style(text) for text in prompt.texts])
    chunks: list[list[list[list[Token]]]] = [[] for _ in prompts]
    for encoder, tokenizer in enumerate(tokenizers):
        room, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
        texts = list(dict.fromkeys(part.text for parts in read for part in parts[encoder] if part.text is not None))
        found = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ids = dict(zip(texts, found, strict=True))
        for mine, parts in zip(chunks, read, strict=True):
            pieces = [None if p.text is None else [(i, p.weight) for i in ids[p.text]] for p in parts[encoder]]
            mine.append(chunking.CUTS[options.long_captions](pieces, room, comma))
    return [_padded(tokenizers, both, options) for both in chunks]


def _padded(tokenizers: tuple[Any, Any], both: list[list[list[Token]]], options: TextOptions) -> Tokens:
    """Both encoders' chunks, as many as the longer one has."""
    rows = chunking.count(max(map(len, both)), options.long_captions, options.max_chunks)
    kept = 1 if options.long_captions == "cut" else options.max_chunks
    lost = next((gone for chunks in both if (gone := [i for chunk in chunks[kept:] for i, _ in chunk])), [])
    count = max(sum(map(len, chunks)) for chunks in both)
    ids, weights = [], []
    for tokenizer, chunks in zip(tokenizers, both, strict=True):
        length = tokenizer.model_max_length
        filled = [*chunks[:kept], *[[]] * (rows - len(chunks[:kept]))]
        ids.append([_row(tokenizer, [i for i, _ in chunk], length) for chunk in filled])
        weights.append([[1.0, *(w for _, w in chunk), *[1.0] * (length - 1 - len(chunk))] for chunk in filled])
    factors = torch.tensor(weights)
    plain = bool((factors == 1).all())
    stacked = torch.tensor(ids, dtype=torch.int32).transpose(0, 1).contiguous()
    return Tokens(stacked, None if plain else factors.transpose(0, 1).contiguous(), tuple(lost), count)


def _row(tokenizer: Any, chunk: list[int], length: int) -> list[int]:
    begun = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
    return begun + [tokenizer.pad_token_id] * (length - len(begun))


@dataclass(frozen=True)
class Cut:
    """A prompt that is longer than its chunks: how many tokens are cut off, and their text."""

    prompt: Prompt
    tokens: int
    text: str


def cuts(tokenizers: tuple[Any, Any], prompts: Sequence[Prompt], tokens: Sequence[Tokens]) -> list[Cut]:
    """What is cut off, of the prompts that do not fit."""
    pairs = [(prompt, found.lost) for prompt, found in zip(prompts, tokens, strict=True) if found.lost]
    return [Cut(prompt, len(lost), tokenizers[0].decode(list(lost)).strip()) for prompt, lost in pairs]


def longest(options: TextOptions) -> int:
    """Tokens of a caption that nothing is cut from."""
    return 75 * (1 if options.long_captions == "cut" else options.max_chunks)


def embed(encoders: tuple[Any, Any], ids: Tensor, clip_skip: int = 2) -> tuple[list[Tensor], Tensor]:
    """States [C, 77, 768], [C, 77, 1280] and pooled output [C, 1280] of chunks [C, 2, 77], in the encoders' dtype.

    SDXL reads the states before the last layer of both encoders, without final norm, and the projected
    end-of-text state of the second (Podell et al. 2023, section 2.1). `clip_skip` counts layers from the end, as the
    user interfaces do: 2 is the one before the last. It has nothing to do with the pooled output.
    """
    outputs = [encoder(ids[:, i], output_hidden_states=True) for i, encoder in present(encoders)]
    return [output.hidden_states[-clip_skip] for output in outputs], outputs[-1][0]


def present(encoders: tuple[Any, Any]) -> list[tuple[int, Any]]:
    """The encoders that there are, with their numbers: SDXL's refiner has only the second."""
    return [(number, encoder) for number, encoder in enumerate(encoders) if encoder is not None]


def weigh(states: Tensor, weights: Tensor, emphasis: str, empty: Tensor) -> Tensor:
    """States [C, 77, D] under their tokens' weights [C, 77]; `empty` [1, 77, D] are those of the empty chunk.

    A1111 multiplies, and then brings each chunk's mean back to what it was; ComfyUI moves between the empty chunk's
    states and these.
    """
    wide, factors, zero = states.float(), weights[..., None], empty.float()
    if emphasis == "comfyui":
        return torch.where(factors == 1, wide, (wide - zero) * factors + zero).to(states.dtype)
    changed = wide * factors
    if emphasis == "a1111":
        means = [tensor.mean(dim=(1, 2), keepdim=True) for tensor in (wide, changed)]
        changed = torch.where((factors == 1).all(dim=1, keepdim=True), wide, changed * (means[0] / means[1]))
    return changed.to(states.dtype)


def join(states: Tensor, kind: str) -> Tensor:
    """Chunks [..., n, 77, D] as one sequence [..., n * 77, D]; kohya's keeps one begin and one end: n * 75 + 2."""
    if kind != "kohya":
        return states.flatten(-3, -2)
    first, last = states[..., 0, :1, :], states[..., -1, -1:, :]
    return torch.cat([first, states[..., :, 1:-1, :].flatten(-3, -2), last], dim=-2)


def weighted(
    encoders: tuple[Any, Any], ids: Tensor, weights: Tensor | None, options: TextOptions, size: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """`embed` under weights [C, 2, 77], if there are any: then the first chunk is the empty one. With a `size` always
    so many chunks at once, the last repeated if there are fewer: see `data.encode`."""
    if size is None:
        states, pooled = embed(encoders, ids, options.clip_skip)
    else:
        filled = torch.cat([ids, ids[-1:].expand(-len(ids) % size, -1, -1)])
        parts = [embed(encoders, part, options.clip_skip) for part in filled.split(size)]
        states = [torch.cat(found)[: len(ids)] for found in zip(*(s for s, _ in parts), strict=True)]
        pooled = torch.cat([p for _, p in parts])[: len(ids)]
    if weights is None:
        return states, pooled
    numbered = zip(present(encoders), states, strict=True)
    return [weigh(s, weights[:, i], options.emphasis, s[:1]) for (i, _), s in numbered], pooled


@torch.no_grad()
def encode(text: TextEncoders, prompts: Sequence[Prompt], options: TextOptions) -> list[tuple[Tensor, Tensor]]:
    """Embeddings [n * 77, 768 + 1280] and pooled output [1280] of each prompt: those of its first chunk."""
    return encode_tokens(text, tokenize(text.tokenizers, prompts, options), options)


@torch.no_grad()
def encode_tokens(
    text: TextEncoders,
    tokens: Sequence[Tokens],
    options: TextOptions,
    size: int | None = None,
    device: torch.device | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """As `encode`, of what is tokenized; `size` as in `weighted`. `device`: where the encoders compute, if their
    weights do not lie there."""
    device = device or next(text.encoders[1].parameters()).device
    empty = tokenize(text.tokenizers, [Prompt("")], options)[0].ids[:1]
    heavy = any(found.weights is not None for found in tokens)
    ids = torch.cat([empty, *(found.ids for found in tokens)] if heavy else [found.ids for found in tokens])
    weights = torch.cat([torch.ones(empty.shape), *(factors(found) for found in tokens)]) if heavy else None
    placed = None if weights is None else weights.to(device)
    states, pooled = weighted(text.encoders, ids.to(device).long(), placed, options, size)
    results, start = [], int(heavy)
    for found in tokens:
        chunks = slice(start, start + len(found.ids))
        results.append((torch.cat([join(s[chunks], options.long_captions) for s in states], dim=-1), pooled[start]))
        start += len(found.ids)
    return results


def factors(tokens: Tokens) -> Tensor:
    """Weights of a prompt's tokens, ones if it has none."""
    return torch.ones(tokens.ids.shape) if tokens.weights is None else tokens.weights


def refuse_clip_skip(base: Base, options: TextOptions) -> None:
    """Refuse a layer that the encoders do not have."""
    layers = min(base.config(part)["num_hidden_layers"] for part in base.encoders)
    if options.clip_skip > layers:
        what = f"text.clip_skip = {options.clip_skip}, and a text encoder has {plural(layers, 'layer')}"
        raise UserError(what, "text.clip_skip", f"give 1 to {layers}; SDXL was trained with 2")


def parameter_names(base: Base) -> Iterator[str]:
    """Names of the encoders' parameters as rules see them, without loading what they would be read from."""
    layer = [f"self_attn.{p}_proj" for p in "qkv"] + [
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm1",
        "layer_norm2",
    ]
    for part in base.encoders:
        layers = [f"encoder.layers.{i}.{m}" for i in range(base.config(part)["num_hidden_layers"]) for m in layer]
        modules = [f"{m}.{kind}" for m in [*layers, "final_layer_norm"] for kind in ("weight", "bias")]
        modules += ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
        # transformers 5 dropped the prefix of the first encoder's names.
        yield from (f"{part}.{prefix}{name}" for prefix in ("", "text_model.") for name in modules)
    yield "text_encoder_2.text_projection.weight"
