"""Which model a file belongs to, told by the names and shapes in its header: SDXL's own, or others, by their names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError, shortened

Entries = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """What a file is. `name` is one of the kinds that `sdxl convert` knows, or empty for what it does not."""

    name: str
    label: str


# (what is found, the kind, what people call it): the first that holds decides.
_TABLE: list[tuple[Callable[[Entries], bool], str, str]] = [
    (lambda e: _any(e, r"(lora_unet_|lora_transformer_)(double|single)_blocks_"), "", "an adapter for Flux"),
    (lambda e: _any(e, r"transformer\.single_transformer_blocks\..*lora"), "", "an adapter for Flux"),
    (lambda e: _any(e, r"lora_unet_joint_blocks_|transformer\..*\.add_q_proj\.lora"), "", "an adapter for SD 3"),
    (
        lambda e: _any(e, r"(transformer|diffusion_model)\.(transformer_)?(blocks|layers)\..*lora"),
        "",
        "an adapter for a model with a transformer in place of a UNet",
    ),
    (lambda e: _adapter(e) and _context(e) == 768, "", "an adapter for SD 1"),
    (lambda e: _adapter(e) and _context(e) == 1024, "", "an adapter for SD 2"),
    (
        lambda e: (
            _adapter(e) and _any(e, r"lora_unet_down_blocks_0_attentions|down_blocks\.0\.attentions|input_blocks_1_1")
        ),
        "",
        "an adapter for SD 1 or 2",
    ),
    (lambda e: _adapter(e) and _any(e, r"controlnet_cond_embedding|lora_controlnet"), "", "a ControlNet LoRA"),
    (lambda e: _kohya(e), "kohya", "SDXL adapter, kohya and ComfyUI layout"),
    (lambda e: _adapter(e), "diffusers", "SDXL adapter, diffusers and PEFT layout"),
    (lambda e: {"clip_l", "clip_g"} <= e.keys(), "embedding", "SDXL embedding (textual inversion)"),
    (lambda e: {"text_encoders_0", "text_encoders_1"} <= e.keys(), "embedding", "SDXL embedding (textual inversion)"),
    (lambda e: "emb_params" in e, "", "an embedding for SD 1 or 2"),
    (
        lambda e: 1 <= len(e) <= 4 and all(_side(v) in (768, 1280) for v in e.values()),
        "embedding",
        "one half of an SDXL embedding",
    ),
    (lambda e: _any(e, r"(model\.diffusion_model\.)?double_blocks\.0\.img_attn"), "", "a model of the Flux family"),
    (lambda e: _any(e, r"(model\.diffusion_model\.)?joint_blocks\.0\."), "", "an SD 3 model"),
    (lambda e: _any(e, r"cond_stage_model\.transformer\."), "", "an SD 1 model"),
    (lambda e: _any(e, r"cond_stage_model\.model\."), "", "an SD 2 model"),
    (lambda e: _any(e, r"conditioner\.embedders\.0\.model\.transformer\.resblocks"), "", "an SDXL refiner"),
    (lambda e: _any(e, r"zero_convs\.|control_model\.|controlnet_cond_embedding"), "", "a ControlNet"),
    (lambda e: _in_channels(e) not in (None, 4), "", "an SDXL for inpainting or editing, with more input channels"),
    (
        lambda e: _any(e, r"model\.diffusion_model\.") and _any(e, r"conditioner\.embedders\.1\."),
        "single",
        "SDXL, one file in the original layout",
    ),
    (
        lambda e: (
            _any(e, r"model\.diffusion_model\.(input|middle|output)_block")
            and _any(e, r"model\.diffusion_model\.label_emb\.")
        ),
        "unet",
        "the UNet of an SDXL alone",
    ),
    (lambda e: _any(e, r"model\.diffusion_model\."), "", "a model of another architecture"),
    (lambda e: _any(e, r"(first_stage_model\.)?(encoder\.down\.0|decoder\.up\.0)\."), "", "a VAE alone"),
    (
        lambda e: _any(e, r"down_blocks\.0\.resnets|encoder\.down_blocks\.0|text_model\.encoder\.layers\.0"),
        "",
        "one part of a diffusers folder",
    ),
    (
        lambda e: _any(e, r"(transformer_blocks|single_transformer_blocks|blocks)\.0\."),
        "",
        "a transformer model such as SD 3, Flux or PixArt",
    ),
]


def recognise(entries: Entries) -> Kind:
    """What a file with this header is."""
    for holds, name, label in _TABLE:
        if holds(entries):
            return Kind(name, label)
    return Kind("", "a file of an unknown kind")


def refuse_foreign(path: Path, entries: Entries, wanted: str) -> None:
    """UserError unless the file is what is wanted: 'adapter', 'embedding' or 'single'."""
    kind = recognise(entries)
    groups = {"adapter": ("kohya", "diffusers"), "embedding": ("embedding",), "single": ("single",)}
    if kind.name not in groups[wanted]:
        begins = (
            f"; it begins with {shortened(sorted(entries), 2)}" if not kind.name and "unknown" in kind.label else ""
        )
        names = {
            "adapter": "an adapter for SDXL",
            "embedding": "an embedding for SDXL",
            "single": "a whole SDXL in one file",
        }
        fix = f"give {names[wanted]}"
        raise UserError(f"this is {_article(kind.label)}{begins}", str(path), fix)


def _article(label: str) -> str:
    return label if label.startswith(("a ", "an ", "one ", "the ")) else f"an {label}"


def _any(entries: Entries, pattern: str) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.match(name) or compiled.search(name) for name in entries)


def _adapter(entries: Entries) -> bool:
    return _any(
        entries,
        r"lora_(up|down|A|B|linear_layer)\b|_lora\.(up|down)|\.lora\.(up|down)|\.(hada|lokr)_|^lora_(unet|te\d?)_|oft_|boft_|\.ia3_",
    )


def _kohya(entries: Entries) -> bool:
    return all(re.match(r"lora_(unet|te\d?)_", name) for name in entries) and bool(entries)


def _context(entries: Entries) -> int | None:
    """The width of the text that the UNet's cross attention reads, from an adapter of its keys."""
    for name, entry in entries.items():
        if re.search(r"attn2[._](processor\.)?to_k", name) and re.search(r"down|lora_A|hada_w1_b", name):
            return int(entry["shape"][-1] if "hada" in name or len(entry["shape"]) == 2 else entry["shape"][1])
    return None


def _in_channels(entries: Entries) -> int | None:
    entry = entries.get("model.diffusion_model.input_blocks.0.0.weight")
    return int(entry["shape"][1]) if entry and len(entry["shape"]) == 4 else None


def _side(entry: dict[str, Any]) -> int:
    return int(entry["shape"][-1]) if len(entry["shape"]) == 2 else 0
