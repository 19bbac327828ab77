"""Adapters on disk. What diffusers can load lies in one file with its keys; other kinds in the folders of peft.

pytorch_lora_weights.safetensors      lora, dora: unet.<layer>.lora_A.weight, ...; ranks and alphas in the header
unet_adapter/ text_encoder_adapter/   other kinds: adapter_config.json and adapter_model.safetensors
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.adapters import NAME
from sdxl_trainer.formats import ADAPTER_FILE
from sdxl_trainer.formats import folder as pipelines
from sdxl_trainer.formats.lora import ADAPTER_METADATA
from sdxl_trainer.model import SDXL

FOLDER = "_adapter"  # after the part's name
_PEFT = "base_model.model."


def save(output: Path, sdxl: SDXL, values: Mapping[str, Tensor], facts: Mapping[str, str], suffix: str = "") -> None:
    """Write the adapter whose parameters have these values, in fp32, whole or not at all. `facts` go into the header
    of the file; `suffix` into the name."""
    found = {part: module for part, module in sdxl.parts().items() if hasattr(module, "peft_config")}
    tensors = {part: tensors_of(part, values) for part in found}
    configs = {part: module.peft_config[NAME] for part, module in found.items()}
    if configs and all(config.peft_type.value == "LORA" for config in configs.values()):
        named = {
            f"{part}.{name}": tensor
            for part, own in tensors.items()
            for name, tensor in pipelines.published_names(part, own).items()
        }
        said = {f"{part}.{key}": value for part, config in configs.items() for key, value in told(config).items()}
        more = {ADAPTER_METADATA: json.dumps(said, sort_keys=True)}
        path = output / ADAPTER_FILE.replace(".safetensors", f"{suffix}.safetensors")
        pipelines.write_tensors(path, named, {**facts, **more})
        return
    for part, config in configs.items():
        write = partial(_peft_folder, config, tensors[part])
        files.write_atomically(output / f"{part}{FOLDER}{suffix}", write)


def tensors_of(part: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's tensors under the names of peft's files, without the adapter's own name."""
    # Rows of new words have a file of their own.
    mine = [name for name in values if name.startswith(f"{part}.") and ".token_embedding.new." not in name]
    own = {name.removeprefix(f"{part}."): values[name] for name in mine}
    magnitude = f".lora_magnitude_vector.{NAME}.weight"
    # transformers looks for the name of the module's parameter, diffusers and peft for their own.
    short = ".lora_magnitude_vector" if part == "unet" else ".lora_magnitude_vector.weight"
    return {n.replace(magnitude, short).replace(f".{NAME}", ""): v for n, v in own.items()}


def told(config: Any) -> dict[str, Any]:
    """A config of peft as plain data."""
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    return {key: getattr(value, "value", value) for key, value in plain.items() if value is not None}


def _peft_folder(config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    files.write_json(folder / "adapter_config.json", told(config))
    pipelines.write_tensors(folder / "adapter_model.safetensors", {f"{_PEFT}{n}": t for n, t in tensors.items()})
