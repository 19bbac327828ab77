"""Adapters from files, put into a pipeline to draw with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdxl_trainer.adapter_files import FILE
from sdxl_trainer.adapters import quiet
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import header

PARTS = ("unet", "text_encoder", "text_encoder_2")
AGAIN = "download or train the file again"
# How keys of other models' files begin: the model, in words.
FOREIGN = {
    "transformer.": "Flux, SD 3 or another transformer",
    "lora_transformer_": "Flux, SD 3 or another transformer",
    "lora_unet_double_blocks": "Flux",
    "lora_unet_single_blocks": "Flux",
    "diffusion_model.double_blocks": "Flux",
    "lora_te_": "SD 1 or 2",
    "prior.": "Stable Cascade or Wuerstchen",
}


def attach(pipeline: Any, wanted: Sequence[str]) -> None:
    """Load adapters, each FILE or FILE:weight, where FILE may be a run's folder; together they act as their sum."""
    names, weights = [], []
    for number, text in enumerate(wanted):
        path, weight = located(text)
        load(pipeline, path, f"adapter_{number}")
        names.append(f"adapter_{number}")
        weights.append(weight)
    if names:
        with quiet():
            pipeline.set_adapters(names, weights)


def located(text: str) -> tuple[Path, float]:
    """The file that FILE or FILE:weight names, and the weight (default 1)."""
    path, weight = Path(text).expanduser(), 1.0
    name, colon, number = text.rpartition(":")
    if not path.exists() and colon:
        try:
            path, weight = Path(name).expanduser(), float(number)
        except ValueError:
            raise UserError(f"'{number}' in '{text}' is not a weight", "--lora", "write FILE:0.8") from None
    found = path / FILE if path.is_dir() else path
    if not found.is_file():
        what = f"there is no {FILE} in '{path}'" if path.is_dir() else f"there is no file '{path}'"
        raise UserError(what, "--lora", "give an adapter's .safetensors file or the folder of a run that made one")
    return found, weight


def load(pipeline: Any, path: Path, name: str) -> None:
    """Load one adapter by what diffusers reads: its own keys, and those of kohya."""
    refuse_foreign(header.read(path, AGAIN), path)
    try:
        state, _, _ = pipeline.lora_state_dict(path, unet_config=pipeline.unet.config, return_lora_metadata=True)
        refuse_unfit({part: getattr(pipeline, part) for part in PARTS}, state, path)
        with quiet():
            pipeline.load_lora_weights(path, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        said = str(error).strip().splitlines()[0] or type(error).__name__
        raise UserError(f"the adapter cannot be loaded: {said}", str(path), "use a LoRA made for SDXL base") from error


def refuse_foreign(keys: Mapping[str, Any], path: Path) -> None:
    """Refuse files whose keys tell that they are for another model."""
    fix = "use a LoRA made for SDXL base"
    if not keys:
        raise UserError("the file holds no tensor", str(path), AGAIN)
    for key in keys:
        model = next((model for start, model in FOREIGN.items() if key.startswith(start)), None)
        if model:
            raise UserError(f"this adapter is for {model}, not for SDXL: it holds '{key}'", str(path), fix)


def refuse_unfit(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors whose layers the model does not have, or has in other sizes."""
    layers = {f"{part}.{_bare(n)}": m for part, module in parts.items() for n, m in module.named_modules() if n}
    strangers = []
    for key, tensor in state.items():
        layer = _owner(_bare(key), layers)
        if layer is None:
            strangers.append(key)
        elif tensor.ndim > 1 and not _fits(key, tensor, layer):
            what = f"'{key}' is {list(tensor.shape)}, and the layer's weight {list(layer.weight.shape)}"
            raise UserError(f"this adapter is for another model: {what}", str(path), "use a LoRA made for SDXL base")
    if strangers:
        what = f"{len(strangers)} of {len(state)} tensors are for layers that this model has not"
        raise UserError(f"{what}: {shortened(strangers, 2)}", str(path), "use a LoRA made for SDXL base")


def _owner(key: str, layers: Mapping[str, nn.Module]) -> Any:
    """The layer with a weight beside which a key's tensor stands."""
    while "." in key:
        key = key.rpartition(".")[0]
        if isinstance(getattr(layers.get(key), "weight", None), Tensor):
            return layers[key]
    return None


def _fits(key: str, tensor: Tensor, layer: Any) -> bool:
    if any(mark in key for mark in ("lora_A", "lora.down", "lora_down")):
        return tensor.shape[1] == layer.weight.shape[1]
    if any(mark in key for mark in ("lora_B", "lora.up", "lora_up")):
        return tensor.shape[0] == layer.weight.shape[0]
    return True


def _bare(name: str) -> str:
    """A name without the prefix that transformers 5 dropped from the first text encoder's."""
    return name.replace("text_model.", "")
