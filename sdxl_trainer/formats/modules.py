"""The module of each component from its configuration, and whether given weights fit it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer.errors import UserError, sentence, shortened
from sdxl_trainer.formats.folder import published_names


def construct(component: str, config: dict[str, Any]) -> nn.Module:
    """The module of one component with fresh weights, in the default dtype and on the default device."""
    return _CONSTRUCT[component](config)


def check(component: str, config: dict[str, Any], weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights whose published names or shapes are not those that the configuration asks for."""
    with torch.device("meta"):
        module = construct(component, config)
    expected = {name: tensor.shape for name, tensor in published_names(component, module.state_dict()).items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    if given == expected:
        return
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & given.keys() if expected[name] != given[name])
    problems = [
        f"{sentence(len(names), f'tensors {how}')} ({shortened(names, 2)})"
        for how, names in (("are missing", missing), ("are unknown", unknown), ("have another shape", other))
        if names
    ]
    raise UserError(
        f"the weights of '{component}' do not fit its configuration: {'; '.join(problems)}",
        where,
        "if this model is smaller or larger than SDXL base 1.0, name a diffusers folder that has its configurations: "
        "sdxl convert --base FOLDER, or model.configs in a config",
    )


def _unet(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def _vae(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def _text_encoder_2(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


_CONSTRUCT: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder_2,
}
