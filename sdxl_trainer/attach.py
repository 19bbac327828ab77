"""Adapters from files, put into a pipeline to draw with."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_trainer.adapter_files import FOLDER
from sdxl_trainer.adapters import quiet
from sdxl_trainer.errors import UserError, sentence, shortened
from sdxl_trainer.formats import ADAPTER_FILE, header

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
    found = [located(text, "--lora") for text in wanted]
    folders = [(path, weight) for path, weight in found if path.is_dir()]
    if folders:
        if len(found) > 1:
            what = f"'{folders[0][0]}' holds an adapter of a kind that cannot be added to others"
            raise UserError(what, "--lora", "draw with it alone")
        load_folder(pipeline, *folders[0])
        return
    for number, (path, _) in enumerate(found):
        load(pipeline, path, f"adapter_{number}")
    names, weights = [f"adapter_{number}" for number in range(len(found))], [weight for _, weight in found]
    if names:
        with quiet():
            pipeline.set_adapters(names, weights)


def located(text: str, where: str) -> tuple[Path, float]:
    """The file that FILE or FILE:weight names, or the folder that holds folders of peft; the weight (default 1)."""
    path, weight = Path(text).expanduser(), 1.0
    name, colon, number = text.rpartition(":")
    if not path.exists() and colon:
        try:
            path, weight = Path(name).expanduser(), float(number)
        except ValueError:
            raise UserError(f"'{number}' in '{text}' is not a weight", where, "write FILE:0.8") from None
    if not math.isfinite(weight):
        raise UserError(f"'{number}' in '{text}' is not a weight", where, "write FILE:0.8")
    if any((path / f"{part}{FOLDER}").is_dir() for part in PARTS):
        return path, weight
    found = path / ADAPTER_FILE if path.is_dir() else path
    if not found.is_file():
        what = f"there is no {ADAPTER_FILE} in '{path}'" if path.is_dir() else f"there is no file '{path}'"
        raise UserError(what, where, "give an adapter's .safetensors file or the folder of a run that made one")
    return found, weight


def load_folder(pipeline: Any, folder: Path, weight: float) -> None:
    """Load an adapter in peft's folders, one for each part."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    for part in PARTS:
        own = folder / f"{part}{FOLDER}"
        if not own.is_dir():
            continue
        module, tensors = getattr(pipeline, part), read_folder(own)
        try:
            with quiet():
                config = PeftConfig.from_pretrained(str(own))
                inject_adapter_in_model(config, module, "adapter")
                result: Any = set_peft_model_state_dict(module, tensors, "adapter")
                unexpected = result.unexpected_keys
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            said = str(error).strip().splitlines()[0]
            raise UserError(
                f"the adapter cannot be loaded: {said}", str(own), "use the base it was made for"
            ) from error
        if unexpected:
            what = sentence(len(unexpected), "tensors are for layers that this model has not")
            what += f": {shortened(unexpected, 2)}"
            raise UserError(what, str(own), "use the base it was made for")
        if weight != 1.0:
            _scale(module, weight, own)


def _scale(module: nn.Module, weight: float, folder: Path) -> None:
    from peft.tuners.lycoris_utils import LycorisLayer

    layers = [layer for layer in module.modules() if isinstance(layer, LycorisLayer)]
    if not layers:
        raise UserError("a rotation has no weight", str(folder), "draw with it as it is: leave out the number")
    for layer in layers:
        layer.set_scale("adapter", weight)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of peft, by the names of the module's parameters without the adapter's."""
    path = folder / "adapter_model.safetensors"
    header.read(path, AGAIN)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}


def load(pipeline: Any, path: Path, name: str) -> None:
    """Load one adapter by what diffusers reads: its own keys, and those of kohya."""
    refuse_foreign(header.read(path, AGAIN), path)
    try:
        state, _, _ = pipeline.lora_state_dict(path, unet_config=pipeline.unet.config, return_lora_metadata=True)
        parts = {part: module for part in PARTS if (module := getattr(pipeline, part)) is not None}
        refuse_unfit(parts, renamed(state), path)
        with quiet():
            pipeline.load_lora_weights(path, adapter_name=name)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        said = str(error).strip().splitlines()[0] or type(error).__name__
        raise UserError(f"the adapter cannot be loaded: {said}", str(path), "use a LoRA made for SDXL base") from error


def renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Entries under peft's names, from any that `lora_state_dict` of diffusers gives."""
    return {_renamed(key): value for key, value in state.items()}


def _renamed(key: str) -> str:
    key = key.replace(".processor.", ".")  # where older versions kept the attention's adapters
    layer = r".\1_proj" if key.startswith("text_encoder") else r".to_\1"
    key = re.sub(r"\.to_(q|k|v|out)_lora\.(down|up)\.", rf"{layer}.lora.\2.", key)
    key = key.replace(".to_out.lora.", ".to_out.0.lora.")
    key = re.sub(r"\.(lora|lora_linear_layer)\.(down|up)\.", r".lora.\2.", key)
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")


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
