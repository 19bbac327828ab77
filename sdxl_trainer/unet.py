"""SDXL's UNet (Podell et al. 2023) and its kin of any size, the refiner and inpainting models.

Parameters have diffusers' names and shapes, so that weights, adapters and rules fit either. Nothing is here that SDXL
does not use; `fits` says whether a config asks for more, and then the library's module is what there is.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdxl_trainer.formats import folder as pipelines
from sdxl_trainer.formats import pretrained
from sdxl_trainer.kernels import Conv, Conv1x1, GroupNorm, Linear, attention, geglu, on_cpu

# The library's defaults of the entries that make a UNet.
DEFAULTS: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,  # the number of heads, whatever it is called
    "time_cond_proj_dim": None,
}
# Entries that have to be there, and those that may, with the only value that is built here.
_NEEDED = {"addition_embed_type": "text_time", "use_linear_projection": True}
_PLAIN: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
_KINDS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
_SIZES = {"addition_time_embed_dim", "projection_class_embeddings_input_dim"}
# Entries that change nothing in the module.
_WORDS = {"sample_size", "addition_embed_type_num_heads", "_diffusers_version", "_name_or_path"}


def fits(config: dict[str, Any]) -> bool:
    """Whether `UNet` is the model that a config of diffusers describes. What is not known here has to be off."""
    whole = {**DEFAULTS, **config}
    off = whole.keys() - DEFAULTS.keys() - _NEEDED.keys() - _PLAIN.keys() - _SIZES - _WORDS
    sizes = (whole["transformer_layers_per_block"], whole["attention_head_dim"])
    plain = all(isinstance(n, int) for size in sizes for n in (size if isinstance(size, list | tuple) else [size]))
    return (
        plain
        and isinstance(whole["layers_per_block"], int)
        and isinstance(whole["cross_attention_dim"], int)
        and all(isinstance(whole.get(key), int) for key in _SIZES)
        and all(whole.get(key) == value for key, value in _NEEDED.items())
        and all(whole.get(key, value) == value for key, value in _PLAIN.items())
        and {*whole["down_block_types"], *whole["up_block_types"]} <= _KINDS
        and not whole["time_cond_proj_dim"]
        and not any(whole[key] for key in off if not key.startswith("_"))
    )


class Settings(dict[str, Any]):
    """A config whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def sinusoid(numbers: Tensor, width: int) -> Tensor:
    """[..., width] in fp32: cosines, then sines, of numbers (Vaswani et al. 2017)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=numbers.device)
    angles = numbers[..., None].float() * torch.exp(steps * -math.log(10000) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    recomputed = False  # in the backward pass

    def __init__(self, inputs: int, outputs: int, time: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv(inputs, outputs, 3, padding=1)
        self.time_emb_proj = Linear(time, outputs)
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv1x1(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, C, h, w]; time [B, T], activated."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context, width, bias=False)
        self.to_v = Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out[0](attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    recomputed = False

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, h * w, C]; context [B, L, D]."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, context: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, 1e-6)
        self.proj_in = Linear(width, width)
        blocks = (BasicTransformerBlock(width, heads, context) for _ in range(layers))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """x [B, C, h, w]: no copy where channels lie last."""
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.transformer_blocks:
            h = run(block, h, context)
        return x + self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Sampler(nn.Module):
    """To half the side, or to the given one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.conv(x if size is None else F.interpolate(x, size=size))


class Block(nn.Module):
    """Resnets, each followed by a transformer if there are some, and what changes the side."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None


class UNet(nn.Module):
    """`config` is diffusers'. Called as the library's UNet is, by its pipelines too."""

    down_blocks: Any
    mid_block: Any
    up_blocks: Any
    # What accelerate's FSDP wraps, and torch.compile compiles once for all.
    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock2D")
    _repeated_blocks = ("BasicTransformerBlock",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        config = self.config = Settings({**DEFAULTS, **config})
        widths, time = config["block_out_channels"], 4 * config["block_out_channels"][0]
        self.conv_in = Conv(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time)
        self.add_embedding = Embedding(config["projection_class_embeddings_input_dim"], time)
        self.down_blocks = nn.ModuleList(_down(config))
        self.up_blocks = nn.ModuleList(_up(config))
        middle = [_resnet(config, widths[-1], widths[-1]) for _ in range(2)]
        self.mid_block = Block(middle, [_transformer(config, len(widths) - 1)])
        self.conv_norm_out = GroupNorm(config["norm_num_groups"], widths[0], config["norm_eps"])
        self.conv_out = Conv(widths[0], config["out_channels"], 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
        **unused: None,
    ) -> tuple[Tensor]:
        """([B, out_channels, h, w],) from sample [B, in_channels, h, w], timestep [B] or [], encoder_hidden_states
        [B, L, D], and `text_embeds` [B, P] and `time_ids` [B, 6], whose sinusoids are computed in fp32."""
        if given := [name for name, value in unused.items() if value is not None]:
            raise TypeError(f"this UNet does not take {given[0]}")
        # Channels last, so that no copy is needed between convolutions and transformers. Not on GPUs, where PyTorch's
        # GroupNorm gives channels first whatever it is given.
        x = sample.contiguous(memory_format=torch.channels_last) if on_cpu(sample) else sample
        time, context = self._time(x, timestep, **added_cond_kwargs), encoder_hidden_states
        kept = [self.conv_in(x)]
        for block in self.down_blocks:
            kept += self._layers(block, kept[-1], time, context)
            if block.downsamplers is not None:
                kept.append(block.downsamplers[0](kept[-1]))
        middle = self.mid_block
        x = self._run(middle.resnets[0], kept[-1], time)
        x = self._run(middle.resnets[1], middle.attentions[0](x, context, self._run), time)
        for block in self.up_blocks:
            x = self._layers(block, x, time, context, kept)[-1]
            if block.upsamplers is not None:
                x = block.upsamplers[0](x, kept[-1].shape[2:])
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)

    def _time(self, x: Tensor, timestep: Tensor, text_embeds: Tensor, time_ids: Tensor, **_: Any) -> Tensor:
        """What every resnet is told, [B, T]: timestep, pooled text, sizes and crop."""
        config, timestep = self.config, timestep.to(x.device).expand(len(x))
        ids = sinusoid(time_ids, config["addition_time_embed_dim"]).flatten(1)
        added = torch.cat([text_embeds, ids.to(text_embeds.dtype)], dim=-1)
        time = self.time_embedding(sinusoid(timestep, config["block_out_channels"][0]).to(x.dtype))
        return F.silu(time + self.add_embedding(added.to(time.dtype)))

    def _layers(
        self, block: Any, x: Tensor, time: Tensor, context: Tensor, kept: list[Tensor] | None = None
    ) -> list[Tensor]:
        """What each layer of a block gives; each takes one of `kept` from its end."""
        found = []
        for index, resnet in enumerate(block.resnets):
            x = self._run(resnet, x if kept is None else torch.cat([x, kept.pop()], dim=1), time)
            if block.attentions is not None:
                x = block.attentions[index](x, context, self._run)
            found.append(x)
        return found

    def _run(self, module: Any, *inputs: Tensor) -> Tensor:
        if module.recomputed and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
        return module(*inputs)

    def enable_gradient_checkpointing(self, share: float = 1.0) -> None:
        """Of this share of the resnets and transformer blocks, which lie evenly among them, keep what they take, and
        compute the rest again in the backward pass."""
        blocks = [m for m in self.modules() if isinstance(m, ResnetBlock2D | BasicTransformerBlock)]
        for number, block in enumerate(blocks):
            block.recomputed = math.ceil((number + 1) * share) > math.ceil(number * share)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_out.weight.device

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UNet":
        return cls(dict(config))

    @classmethod
    def from_pretrained(
        cls, folder: Path, variant: str | None = None, torch_dtype: torch.dtype = torch.float32, **_: Any
    ) -> tuple["UNet", dict[str, list[Any]]]:
        """The model of a diffusers folder, and what its weights lack or have in other shapes."""
        with torch.device("meta"):
            model = cls(json.loads((folder / pipelines.CONFIGS["unet"]).read_text(encoding="utf-8")))
        weights, wanted = {}, model.state_dict()
        for path in pretrained.weight_files(folder, pipelines.WEIGHTS["unet"], variant):
            with safe_open(path, framework="pt") as file:
                # Cast one by one, into memory of their own: a file that is mapped may change.
                found = {
                    name: file.get_tensor(name).to(torch_dtype, copy=True) for name in file.keys() if name in wanted
                }
                weights.update(found)
        reshaped = [(name,) for name, tensor in weights.items() if tensor.shape != wanted[name].shape]
        if not reshaped:
            model.load_state_dict(weights, strict=False, assign=True)
        report: dict[str, list[Any]] = {
            "missing_keys": sorted(wanted.keys() - weights.keys()),
            "mismatched_keys": reshaped,
        }
        return model.requires_grad_(True).eval(), report

    def to_json_string(self) -> str:
        """The config that diffusers reads."""
        return json.dumps(self.config)


def _level(config: Settings, key: str, level: int) -> int:
    """An entry that is one number for all levels or one for each."""
    value = config[key]
    return value if isinstance(value, int) else value[level]


def _resnet(config: Settings, inputs: int, outputs: int) -> nn.Module:
    time = 4 * config.block_out_channels[0]
    return ResnetBlock2D(inputs, outputs, time, config.norm_num_groups, config.norm_eps)


def _transformer(config: Settings, level: int) -> nn.Module:
    width, heads = config.block_out_channels[level], _level(config, "attention_head_dim", level)
    layers = _level(config, "transformer_layers_per_block", level)
    return Transformer2DModel(width, heads, layers, config.cross_attention_dim, config.norm_num_groups)


def _down(config: Settings) -> Iterator[Block]:
    widths, count = config.block_out_channels, config.layers_per_block
    for level, kind in enumerate(config.down_block_types):
        entries = [widths[max(level - 1, 0)]] + [widths[level]] * (count - 1)
        attentions = [_transformer(config, level) for _ in range(count)] if "Attn" in kind else []
        block = Block([_resnet(config, inputs, widths[level]) for inputs in entries], attentions)
        if level + 1 < len(widths):
            block.downsamplers = nn.ModuleList([Sampler(widths[level], stride=2)])
        yield block


def _up(config: Settings) -> Iterator[Block]:
    widths, count = config.block_out_channels, config.layers_per_block + 1
    for level, kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
        below, beside = widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
        entries = [below] + [widths[level]] * (count - 1)
        skips = [widths[level]] * (count - 1) + [beside]
        attentions = [_transformer(config, level) for _ in range(count)] if "Attn" in kind else []
        resnets = [_resnet(config, a + b, widths[level]) for a, b in zip(entries, skips, strict=True)]
        block = Block(resnets, attentions)
        if level > 0:
            block.upsamplers = nn.ModuleList([Sampler(widths[level], stride=1)])
        yield block
