"""What a path holds, and reading it: adapters of any layout, and the components of a whole model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import ADAPTER_FILE, WORD_FILES, families, folder, header, lora, single_file
from sdxl_trainer.formats.lora import Adapter
from sdxl_trainer.formats.lora_names import KOHYA, Layout

AGAIN = "copy or download the file again"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Source:
    kind: str  # one of convert's
    path: Path
    label: str


def identify(path: Path) -> Source:
    """What lies at a path. UserError for nothing, damaged files, pickles, and what belongs to another model."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        there = f"; there are: {shortened(near, 5)}" if near else ""
        raise UserError("there is no such file or folder", str(path), f"check the path{there}")
    if path.is_dir():
        return _folder(path)
    single_file.refuse_pickle(path)
    kind = families.recognise(header.read(path, AGAIN))
    if not kind.name or kind.name == "unet":
        fix = "give a whole SDXL, an adapter for it, or an embedding for it"
        raise UserError(f"this is {kind.label}", str(path), fix)
    return Source(kind.name, path, kind.label)


def _folder(path: Path) -> Source:
    if (path / folder.INDEX).is_file():
        try:
            index = json.loads((path / folder.INDEX).read_text(encoding="utf-8"))
            name = str(index.get("_class_name"))
        except (ValueError, AttributeError):
            raise UserError("model_index.json is not valid JSON", str(path / folder.INDEX), AGAIN) from None
        missing = [part for part in folder.WEIGHTS if not (path / part).is_dir()]
        if missing or not index.get("text_encoder", [None])[0]:
            what = (
                f"this folder holds a {name}, not a whole SDXL: it has no {' and no '.join(missing) or 'text_encoder'}"
            )
            raise UserError(what, str(path), "give a complete folder of SDXL base or a fine-tuned one")
        return Source("folder", path, "SDXL, diffusers folder")
    if (path / ADAPTER_FILE).is_file():
        return identify(path / ADAPTER_FILE)
    if _peft_folders(path):
        return Source("peft", path, "SDXL adapter, folder of peft")
    if (path / WORD_FILES[0]).is_file():
        return Source("embedding", path, "SDXL embedding (textual inversion), diffusers' two files")
    listed = shortened(sorted(entry.name for entry in path.iterdir()), 5) or "nothing"
    what = f"this folder holds neither a model nor an adapter nor an embedding (found: {listed})"
    raise UserError(what, str(path), f"give a folder with {folder.INDEX}, {ADAPTER_FILE} or {PEFT_FILES[0]}, or a file")


def adapter(source: Source, layout: Layout | None) -> Adapter:
    """The adapter of a source."""
    if source.kind in ("folder", "single", "embedding"):
        raise UserError(f"this is no adapter: {source.label}", str(source.path), "give an adapter for SDXL")
    if source.kind != "peft":
        return lora.read(source.path, layout)
    modules: dict[str, lora.Module] = {}
    for part, place in _peft_folders(source.path).items():
        try:
            config = json.loads((place / PEFT_FILES[0]).read_text(encoding="utf-8"))
        except ValueError:
            raise UserError("adapter_config.json is not valid JSON", str(place), AGAIN) from None
        kind = config.get("peft_type")
        if kind not in ("LORA", "LOHA", "LOKR"):
            raise UserError(
                f"this is an adapter of the kind {kind}", str(place), "LoRA, DoRA, LoHa and LoKr are converted"
            )
        modules |= lora.read_peft(place / PEFT_FILES[1], part, config).modules
    return Adapter(modules, {}, layout or lora.SDXL)


def _peft_folders(path: Path) -> dict[str, Path]:
    """Folders of peft below or at a path, by the part that their names speak of."""
    places = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
    found: dict[str, Path] = {}
    for place in places:
        if all((place / name).is_file() for name in PEFT_FILES):
            part = next((part for part in sorted(KOHYA, key=len, reverse=True) if place.name.startswith(part)), "unet")
            found.setdefault(part, place)
    return found


def components(source: Source) -> single_file.Components:
    """The weights of a whole model, memory-mapped, under their published diffusers names."""
    if source.kind == "single":
        return single_file.read(source.path)
    return {component: folder.read_weights(component, source.path) for component in folder.WEIGHTS}


def model(path: Path, where: str) -> Source:
    """The source at a path, which must hold a whole model."""
    found = identify(path)
    if found.kind not in ("folder", "single"):
        raise UserError(
            f"this is {found.label}", f"{where} {path}", "give a whole SDXL: a diffusers folder or one file"
        )
    return found


def layout(source: Source) -> Layout:
    """What the original names of a model's UNet depend on."""
    if source.kind == "folder":
        config: dict[str, Any] = folder.read_config("unet", source.path)
        return Layout(len(config["block_out_channels"]), config["layers_per_block"])
    blocks = "model.diffusion_model.input_blocks."
    names = [name for name in header.read(source.path, AGAIN) if name.startswith(blocks)]
    levels = 1 + sum(name.endswith(".0.op.weight") for name in names)
    numbers = {name.removeprefix(blocks).split(".")[0] for name in names}
    return Layout(levels, len(numbers) // levels - 1)
