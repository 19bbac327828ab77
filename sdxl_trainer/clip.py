"""CLIP's text encoder (Radford et al. 2021) and its tokenizer, without the library that takes seconds to import.

They compute what transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` and `CLIPTokenizer` do, operation by
operation, so that rows of the cache are the same bits; but for products in fp32 on a CPU, where `kernels.linear` is
nearly twice as fast and rounds otherwise. They can be asked, not trained. `model` and `tokenizer` give None for what is
not known here or is not in order: the library can do more, and says what is wrong.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_trainer.formats import folder, pretrained
from sdxl_trainer.kernels import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NEEDED = {*_NUMBERS, "max_position_embeddings", "projection_dim", "eos_token_id"}
# Entries that change nothing here.
_WORDS = {
    *("architectures", "attention_dropout", "bos_token_id", "dropout", "dtype", "initializer_factor"),
    *("initializer_range", "model_type", "pad_token_id", "torch_dtype", "transformers_version"),
}


class Found(NamedTuple):
    """The output of the projection, or else of the last layer, first, as the library has it; and the states before each
    layer and after the last."""

    first: Tensor
    hidden_states: list[Tensor]


class Table(nn.Module):
    """An embedding. PyTorch's own draws its first values, and without a device that takes the compiler's import."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, numbers: Tensor) -> Tensor:
        return F.embedding(numbers, self.weight)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = q.shape[-1] ** -0.5
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config.get("layer_norm_eps", 1e-5)
        self.self_attn = Attention(width, config["num_attention_heads"])
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, inner), "fc2": Linear(inner, width)})
        self.activation = ACTIVATIONS[config["hidden_act"]]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class Encoder(nn.Module):
    """Parameters have the library's names, without its `text_model.`."""

    def __init__(self, config: dict[str, Any], projects: bool) -> None:
        super().__init__()
        width, self.eos = config["hidden_size"], config["eos_token_id"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": Table(config["vocab_size"], width),
                "position_embedding": Table(config["max_position_embeddings"], width),
            }
        )
        layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width, config.get("layer_norm_eps", 1e-5))
        self.text_projection = Linear(width, config["projection_dim"], bias=False) if projects else None

    def forward(self, ids: Tensor, output_hidden_states: bool = True) -> Found:
        """ids [B, n], each row with an end of text."""
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](places)
        states = [x]
        for layer in self.encoder["layers"].children():
            x = layer(x)
            states.append(x)
        last = self.final_layer_norm(x)
        if self.text_projection is None:
            return Found(last, states)
        # Configs of before transformers 4.31 say 2, whatever the end of text is: then it is the largest id.
        ends = (ids if self.eos == 2 else ids == self.eos).int().argmax(dim=-1)
        return Found(self.text_projection(last[torch.arange(len(ids), device=ids.device), ends]), states)


def fits(config: dict[str, Any]) -> bool:
    """Whether `Encoder` computes what the model does that a config of transformers describes."""
    return (
        config.keys() <= _NEEDED | _WORDS | {"hidden_act", "layer_norm_eps"}
        and all(isinstance(config.get(key), int) for key in _NEEDED)
        and config.get("hidden_act") in ACTIVATIONS
        and config.get("model_type") == "clip_text_model"
    )


def model(
    place: Path, config: dict[str, Any], variant: str | None, dtype: torch.dtype, device: torch.device
) -> Encoder | None:
    """The encoder of a folder, frozen."""
    if not fits(config):
        return None
    projects = place.name == "text_encoder_2"
    with torch.device("meta"):
        encoder = Encoder(config, projects)
    wanted = encoder.state_dict()
    weights = pretrained.tensors(place, folder.WEIGHTS[place.name], variant, wanted, "text_model.")
    if weights is None:
        return None
    encoder.load_state_dict({name: value.to(dtype, copy=True) for name, value in weights.items()}, assign=True)
    return encoder.to(device).eval().requires_grad_(False)


# What a tokenizer's config may say beside its special tokens: entries with their only value, None for any.
_READING: dict[str, Any] = {
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": None,  # of other kinds of tokenizers
    "do_lower_case": True,
    "errors": "replace",
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": None,
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # in the order in which the library adds them
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, by the same names as the library's."""

    backend: Any
    model_max_length: int
    bos_token_id: int
    eos_token_id: int
    unk_token_id: int
    pad_token_id: int

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        """Without begin and end of text, and nothing cut off."""
        return {"input_ids": [found.ids for found in self.backend.encode_batch(texts, add_special_tokens=False)]}

    def convert_tokens_to_ids(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        return self.unk_token_id if number is None else number

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False).replace("</w>", " ").strip()


def tokenizer(place: Path) -> Tokenizer | None:
    """The tokenizer of a folder with vocabulary and merges, and no more than those of SDXL say."""
    try:
        config = _read(place / "tokenizer_config.json")
        special = {name: _token(config.pop(name)) for name in _SPECIAL}
        again = _read(place / "special_tokens_map.json") if (place / "special_tokens_map.json").is_file() else {}
        plain = all(key in _READING and _READING[key] in (None, value) for key, value in config.items())
        alike = again.keys() <= special.keys() and all(_token(again[name]) == special[name] for name in again)
        words, merges = _words(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    more = any((place / name).exists() for name in ("tokenizer.json", "added_tokens.json"))
    if more or not (plain and alike and isinstance(config.get("model_max_length"), int)):
        return None
    backend = _backend(words, merges, special)
    ids = [backend.token_to_id(special[name].content) for name in _SPECIAL]
    return Tokenizer(backend, config["model_max_length"], *ids)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _words(place: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges; KeyError if a merge is not of words of the vocabulary."""
    words = {str(word): int(number) for word, number in _read(place / "vocab.json").items()}
    lines = (place / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line and line[:8] != "#version")]
    for left, right in merges:
        _ = words[left], words[right], words[left + right]
    return words, merges


def _token(said: Any) -> Any:
    """A special token as a config says it: its text, or that and how it is found in texts."""
    from tokenizers import AddedToken

    said = {"content": said} if isinstance(said, str) else said
    found = {name: value for name, value in said.items() if name not in {"__type", "special"}}
    return AddedToken(**found, special=True)


def _backend(words: dict[str, int], merges: list[tuple[str, str]], special: dict[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    unknown = special["unk_token"].content
    made: Any = Tokenizer(BPE(vocab=words, merges=merges, unk_token=unknown, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_tokens(list(special.values()))
    return made
