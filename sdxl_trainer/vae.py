"""The encoding half of SDXL's VAE (Rombach et al. 2022), without the libraries that take seconds to import.

It computes what diffusers' `AutoencoderKL` does, operation by operation, so that rows of the cache are the same bits.
Whatever is not known here, or is not in order, is left to the library: it can do more, and says what is wrong.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.formats import folder, pretrained

EPS = 1e-6
# Entries of a config, with the only value that is built here, or None where any will do.
_KNOWN: dict[str, Any] = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    **dict.fromkeys(("block_out_channels", "down_block_types", "up_block_types", "layers_per_block")),
    **dict.fromkeys(("latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor")),
    **dict.fromkeys(("latents_mean", "latents_std", "force_upcast", "mid_block_add_attention")),
}


class Posterior(NamedTuple):
    mean: Tensor
    std: Tensor


class Encoded(NamedTuple):
    latent_dist: Posterior


class ResnetBlock2D(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (layer(places)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        found = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return found.transpose(1, 2).reshape(x.shape) + x


class Middle(nn.Module):
    def __init__(self, width: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width, groups)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = block(x)
        return x


class Sampler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] at half its size."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, and what changes it afterwards: `samplers` is its name."""

    def __init__(self, inputs: int, outputs: int, count: int, groups: int, samplers: str | None) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * count
        self.resnets = nn.ModuleList([ResnetBlock2D(a, b, groups) for a, b in pairwise(widths)])
        if samplers:
            self.add_module(samplers, nn.ModuleList([Sampler(outputs)]))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.resnets, *getattr(self, "downsamplers", ())]:
            x = block(x)
        return x


class Half(nn.Module):
    """What encoder and decoder have in common: of the decoder no more than its names and shapes is wanted."""

    down_blocks: nn.ModuleList

    def __init__(self, config: dict[str, Any], kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        down, groups, count = kind == "down", config["norm_num_groups"], config["layers_per_block"]
        widths = config["block_out_channels"] if down else config["block_out_channels"][::-1]
        entries = [widths[0], *widths[:-1]]
        names = [*[f"{kind}samplers"] * (len(widths) - 1), None]
        sizes = zip(entries, widths, names, strict=True)
        levels = [Level(a, b, count if down else count + 1, groups, name) for a, b, name in sizes]
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.add_module(f"{kind}_blocks", nn.ModuleList(levels))
        self.mid_block = Middle(config["block_out_channels"][-1], groups, config.get("mid_block_add_attention", True))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Encoder(nn.Module):
    """Parameters have diffusers' names and shapes; `encode` is its method of that name."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        channels = config.get("latent_channels", 4)
        self.encoder = Half(config, "down", 3, 2 * channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def encode(self, pixels: Tensor) -> Encoded:
        """Pictures [B, 3, H, W] in -1..1 to the distribution of their latents [B, 4, h, w]."""
        mean, logarithm = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return Encoded(Posterior(mean, torch.exp(0.5 * logarithm.clamp(-30.0, 20.0))))


def fits(config: dict[str, Any]) -> bool:
    """Whether `Encoder` encodes as the model does that a config of diffusers describes."""
    widths = config.get("block_out_channels")
    kinds = {*config.get("down_block_types", ""), *config.get("up_block_types", "")}
    return (
        isinstance(widths, list)
        and len(widths) == len(config["down_block_types"]) == len(config["up_block_types"])
        and kinds == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        and all(isinstance(config.get(key), int) for key in ("layers_per_block", "norm_num_groups"))
        and all(key in _KNOWN or key.startswith("_") for key in config)
        and all(wanted is None or config.get(key, wanted) == wanted for key, wanted in _KNOWN.items())
    )


def decoder(config: dict[str, Any]) -> nn.Module:
    """All that is not of the encoder: a damaged decoder is found before the hours are spent, not after."""
    channels = config.get("latent_channels", 4)
    return nn.ModuleDict(
        {"post_quant_conv": nn.Conv2d(channels, channels, 1), "decoder": Half(config, "up", channels, 3)}
    )


def load(base: Base, dtype: torch.dtype, device: torch.device) -> Any:
    """What encodes pictures: a VAE, frozen, of which `encode` and `dtype` are all that may be used."""
    variant, config = weights_file(base, "vae"), base.config("vae")
    made = _own(base, config, variant, dtype) if fits(config) else None
    if made is None:
        from diffusers import AutoencoderKL

        made = pretrained.load(AutoencoderKL, base.vae, variant, torch_dtype=dtype)
    return made.to(device).eval().requires_grad_(False)


def _own(base: Base, config: dict[str, Any], variant: str | None, dtype: torch.dtype) -> Encoder | None:
    """None if any of the VAE's weights, the decoder's included, is missing or not as it should be."""
    with torch.device("meta"):
        encoder, rest = Encoder(config), decoder(config)
    names = encoder.state_dict().keys()
    weights = pretrained.tensors(base.vae, folder.WEIGHTS["vae"], variant, encoder.state_dict() | rest.state_dict())
    if weights is None:
        return None
    encoder.load_state_dict({name: weights[name].to(dtype, copy=True) for name in names}, assign=True)
    return encoder
