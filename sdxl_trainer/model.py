"""What is trained: one module whose parameter names the rules speak of."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer import text, untrained
from sdxl_trainer import unet as unets
from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.config import Model, TextOptions
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import pretrained

TEXT = TextOptions()


@dataclass(frozen=True)
class Dropout:
    """What decides which inputs adapters drop: keys of the samples in a pass, positions of their text before it is
    repeated, and keys of its chunks. Plain numbers: wrappers move tensors to the device, where layers would have to
    wait for them."""

    keys: tuple[int, ...]
    lengths: tuple[int, ...]
    chunks: tuple[int, ...] = ()


class SDXL(nn.Module):
    """The UNet, and the text encoders if they learn; parameters are named `unet.*`, `text_encoder.*`, ..."""

    unet: Any
    text_encoder: Any
    text_encoder_2: Any

    def __init__(
        self,
        unet: nn.Module,
        encoders: tuple[nn.Module | None, nn.Module] | None = None,
        reading: TextOptions = TEXT,
        frozen: tuple[nn.Module | None, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder, self.text_encoder_2 = encoders or (None, None)
        self.added: set[str] = set()  # parameters that were injected: then they alone may learn
        self.saving: Callable[[], Any] = nullcontext  # how autograd keeps what the backward pass needs
        # For layers that drop: keys of the samples in the pass, positions of their text before it is repeated, and keys
        # of the chunks that the text encoders read. Apart, since these may compute again in the backward pass.
        self.dropout_keys: list[int] = []
        self.dropout_lengths: list[int] = []
        self.dropout_chunks: list[int] = []
        self.reading = reading
        # In a tuple, where PyTorch does not look: they are no part of what is trained, moved and saved.
        self.frozen = frozen

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        time_ids: Tensor,
        prompt_embeds: Tensor | None = None,
        pooled: Tensor | None = None,
        dropout: Dropout | None = None,
        **chunks: Any,
    ) -> Tensor:
        """Prediction [B, 4, h, w] from x_t [B, 4, h, w], timesteps [B], integer time_ids [B, 6], whose sinusoids the
        UNet computes in fp32, and either embeddings [B, L, 2048] and pooled [B, 1280], or what `embed` takes."""
        with self.saving():
            if chunks:
                prompt_embeds, pooled = self.embed(**chunks, dropout=dropout)
            if dropout is not None:
                self.dropout_keys[:], self.dropout_lengths[:] = dropout.keys, dropout.lengths
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            return self.unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]

    def embed(
        self,
        tokens: Tensor,
        chunks: Tensor,
        kept: Tensor,
        weights: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, 2048] and pooled output [B, 1280] from token ids [C, 2, 77], by the encoders that learn or
        the frozen ones. `chunks` [B, N] names each sample's, `kept` [B, 2] is 0 where an encoder's output is to be
        zeros, `weights` [C, 2, 77] are those of the tokens."""
        if dropout is not None:
            self.dropout_chunks[:] = dropout.chunks
        encoders = self.frozen or (self.text_encoder, self.text_encoder_2)
        # Frozen encoders compute in their own type, as they do where captions are cached.
        alone = torch.autocast(tokens.device.type, enabled=False) if self.frozen else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen is None), alone:
            states, pooled = text.weighted(encoders, tokens, weights, self.reading)
        rows = [
            text.join(s[chunks], self.reading.long_captions) * kept[:, i, None, None]
            for (i, _), s in zip(text.present(encoders), states, strict=True)
        ]
        return torch.cat(rows, dim=-1), pooled[chunks[:, 0]] * kept[:, 1, None]

    def parts(self) -> dict[str, Any]:
        """The models in here, by the name of their folder in a pipeline."""
        return {name: part for name, part in self.named_children()}

    def closed(self) -> set[str]:
        """Parameters that no rule may let learn: what nothing depends on, and all of the base beside an adapter."""
        base = {name for name, _ in self.named_parameters() if name not in self.added} if self.added else set()
        return self.unused() | base

    def unused(self) -> set[str]:
        """Parameters that nothing depends on: SDXL reads the first encoder before its last layers."""
        if self.text_encoder is None:
            return set()
        layers = self.text_encoder.config.num_hidden_layers
        unread = [f"encoder.layers.{layer}." for layer in range(layers + 1 - self.reading.clip_skip, layers)]
        names = [name for name, _ in self.named_parameters() if name.startswith("text_encoder.")]
        return {name for name in names if any(part in name for part in [*unread, "final_layer_norm"])}


@dataclass(frozen=True)
class LatentScale:
    """Between the VAE's latents z and those that the UNet sees: (z - mean) * factor."""

    mean: Tensor  # [1, 4, 1, 1]
    factor: Tensor

    def to(self, device: torch.device) -> "LatentScale":
        return LatentScale(self.mean.to(device), self.factor.to(device))

    def sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A posterior sample in the UNet's scale, fp32 [B, 4, h, w]."""
        return (mean.float() + std.float() * noise - self.mean) * self.factor

    def undo(self, latents: Tensor) -> Tensor:
        """The VAE's latents from those of the UNet."""
        return latents / self.factor + self.mean


def latent_scale(config: dict[str, Any]) -> LatentScale:
    """From a VAE's config: its scaling factor, and per-channel statistics where it has them (Playground 2.5)."""
    channels = config.get("latent_channels", 4)
    mean = torch.tensor(config.get("latents_mean") or [0.0] * channels).view(1, -1, 1, 1)
    std = torch.tensor(config.get("latents_std") or [1.0] * channels).view(1, -1, 1, 1)
    return LatentScale(mean, config.get("scaling_factor", 0.18215) / std)


def load(
    options: Model,
    base: Base,
    folder: Path | None,
    dtype: torch.dtype,
    checkpointing: float,
    text_learns: bool,
    reading: TextOptions = TEXT,
    frozen: text.TextEncoders | None = None,
    seed: int = 0,
) -> SDXL:
    """The model in `dtype`: from a checkpoint's folder if given, else the base's or random weights by `seed`. `frozen`
    encoders work in the step without learning."""
    unet = _load_unet(options, base, folder, dtype, seed)
    encoders = text.load_encoders(base, folder, dtype) if text_learns else None
    made = SDXL(unet, encoders, reading, frozen.encoders if frozen else None)
    if checkpointing:
        checkpoint_activations(made, checkpointing)
    return made


def checkpoint_activations(sdxl: SDXL, share: float) -> None:
    """Let the backward pass compute activations again in place of keeping them: of this share of the UNet's blocks,
    and of all layers of text encoders that learn."""
    if isinstance(sdxl.unet, unets.UNet):
        sdxl.unet.enable_gradient_checkpointing(share)
    elif share < 1:
        what = f"diffusers' own UNet, which this model needs, recomputes all of its blocks or none, not {share:g}"
        raise UserError(what, "train.gradient_checkpointing", "use true")
    else:
        sdxl.unet.enable_gradient_checkpointing()
    for _, encoder in text.present((sdxl.text_encoder, sdxl.text_encoder_2)):
        # The old name warns in newer versions of transformers.
        new = getattr(encoder, "activation_checkpointing_enable", None)
        (new or encoder.gradient_checkpointing_enable)()


def _load_unet(options: Model, base: Base, folder: Path | None, dtype: torch.dtype, seed: int) -> Any:
    kind = _unet_class(base.config("unet"), options.attention)
    if folder is None and options.init == "random":
        with pretrained.explained(base.part("unet")):
            made = untrained.make(base.config("unet"), seed)
            with torch.device("meta"):
                unet: Any = kind.from_config(base.config("unet"))
            unet.load_state_dict(made.state_dict(), assign=True)
            # PyTorch's own: that of diffusers warns of every cast.
            return nn.Module.to(unet, dtype)
    path, variant = (folder / "unet", None) if folder else (base.part("unet"), weights_file(base, "unet"))
    unet = pretrained.load(kind, path, variant, torch_dtype=dtype)
    took, takes = unet.config["in_channels"], base.config("unet").get("in_channels", 4)
    if took != takes:  # a checkpoint has a config of its own
        what = f"the base's UNet says that it takes {takes} channels; that of the checkpoint takes {took}"
        raise UserError(what, str(base.part("unet") / "config.json"), "use an intact copy of the base")
    return unet


def _unet_class(config: dict[str, Any], attention: str = "sdpa") -> Any:
    """Our UNet, or the library's for layouts and attention kernels that ours does not have."""
    if attention == "sdpa" and unets.fits(config):
        return unets.UNet
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel


def skeleton(base: Base, text_learns: bool, reading: TextOptions = TEXT) -> SDXL:
    """The model without weights: names and shapes."""
    with torch.device("meta"), pretrained.explained(base.part("unet")):
        unet = _unet_class(base.config("unet")).from_config(base.config("unet"))
        return SDXL(unet, text.empty_encoders(base) if text_learns else None, reading)


def compute_in_fp32(model: nn.Module) -> None:
    """Let a model whose weights are kept in bf16 compute in fp32: each layer casts its own as it is used, so that no
    second copy of the whole exists. For CPUs without bf16 instructions, where bf16 itself is tens of times slower."""
    for module in model.modules():
        kept = dict(module.named_parameters(recurse=False))
        if kept:
            module.register_forward_pre_hook(partial(_swap, kept, cast=True))
            module.register_forward_hook(partial(_swap, kept, cast=False))


def _swap(kept: dict[str, nn.Parameter], module: nn.Module, *_: Any, cast: bool) -> None:
    # Straight into the table: nn.Module refuses plain tensors under the name of a parameter.
    module._parameters.update({name: p.float() if cast else p for name, p in kept.items()})  # type: ignore[misc]


def use_attention(model: SDXL, kind: str, device: torch.device) -> str | None:
    """Choose the attention kernel; gives a line for the user where the wanted one cannot be had."""
    if kind == "sdpa":
        return None
    try:
        if kind == "xformers":
            model.unet.enable_xformers_memory_efficient_attention()
        else:
            model.unet.set_attn_processor(_npu_processor())
    except (ImportError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{kind} attention is not to be had here ({reason}); PyTorch's own SDPA does the same job"
    return None


def _npu_processor() -> Any:
    import torch_npu  # noqa: F401  (its absence is the answer)
    from diffusers.models.attention_processor import AttnProcessorNPU

    return AttnProcessorNPU()
