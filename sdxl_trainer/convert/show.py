"""What a file is, in words: kind, sizes, ranks, how it was trained, its words, and what others know it by."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_trainer.convert import embeddings, sources
from sdxl_trainer.convert.sources import Source
from sdxl_trainer.errors import plural
from sdxl_trainer.formats import header, single_file
from sdxl_trainer.formats.lora import Adapter

Rows = list[tuple[str, str]]

# Entries that are shown as they are, by the words for them.
_TRAINING = {
    "ss_num_train_images": "pictures",
    "ss_resolution": "resolution",
    "ss_steps": "steps",
    "ss_max_train_steps": "steps planned",
    "ss_num_epochs": "epochs",
    "ss_total_batch_size": "batch size",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate, UNet",
    "ss_text_encoder_lr": "learning rate, text encoders",
    "ss_lr_scheduler": "learning-rate shape",
    "ss_optimizer": "optimizer",
    "ss_min_snr_gamma": "Min-SNR gamma",
    "ss_noise_offset": "noise offset",
    "ss_caption_dropout_rate": "captions left out",
    "ss_mixed_precision": "precision",
    "ss_seed": "seed",
    "ss_sd_model_name": "base",
    "ss_training_started_at": "trained on",
}
_ABOUT = ("title", "author", "description", "license", "date", "usage_hint", "merged_from", "architecture")
TAGS = 12


def rows(path: Path) -> tuple[str, dict[str, Rows]]:
    """A title, and rows of name and value by section."""
    source = sources.identify(path)
    metadata = {} if source.path.is_dir() else header.described(source.path, sources.AGAIN)[1]
    sections = {"file": _file(source), **_inside(source, metadata), **_said(metadata)}
    return f"{path.name}: {source.label}", {name: found for name, found in sections.items() if found}


def show(path: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title, sections = rows(path)
    console = Console()
    console.print(Text(title, style="bold"))
    for name, found in sections.items():
        table = Table(box=None, show_header=False, padding=(0, 2), title=Text(name, style="cyan"), title_justify="left")
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in found:
            table.add_row(Text(key), Text(value))
        console.print(table)


def _file(source: Source) -> Rows:
    paths = [p for p in sorted(source.path.rglob("*.safetensors"))] if source.path.is_dir() else [source.path]
    entries = [entry for p in paths for entry in header.read(p, sources.AGAIN).values()]
    dtypes = Counter(entry["dtype"] for entry in entries)
    size = sum(p.stat().st_size for p in paths)
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.most_common())
    return [("size", f"{size:,} bytes"), ("tensors", f"{len(entries):,} ({kinds})")]


def _inside(source: Source, metadata: Mapping[str, str]) -> dict[str, Rows]:
    if source.kind in ("kohya", "diffusers", "peft"):
        return {"adapter": _adapter(sources.adapter(source, None))}
    if source.kind == "embedding":
        first, second, _ = embeddings.read(source.path)
        return {"embedding": [("vectors", f"{len(first)} of {first.shape[1]} and {second.shape[1]}")]}
    if source.kind == "single":
        about = single_file.about(source.path)
        marks = about.v_prediction, about.zero_terminal_snr
        more = [("tensors of no part", f"{len(about.unused)}, such as {about.unused[0]}")] if about.unused else []
    else:
        marks, more = single_file.trained(source.path), []
    layout = sources.layout(source)
    return {
        "model": [
            ("predicts", "v" if marks[0] else "noise (epsilon)"),
            ("schedule", "ends without signal (zero terminal SNR)" if marks[1] else "as SDXL base"),
            ("UNet", f"{layout.levels} levels of {layout.layers} layers"),
            *more,
        ]
    }


def _adapter(adapter: Adapter) -> Rows:
    """Parts with their modules, ranks and alphas."""
    found: Rows = []
    for part in adapter.parts():
        own = [module for name, module in adapter.modules.items() if name.startswith(f"{part}.")]
        kinds = sorted({"dora" if "magnitude" in module.tensors else module.kind for module in own})
        ranks = Counter(module.rank for module in own if module.rank)
        scales = Counter(f"{module.scale:g}" for module in own if module.rank)
        text = f"{plural(len(own), 'module')}, {' and '.join(kinds)}"
        text += f", rank {_counted(ranks)}, alpha / rank {_counted(scales)}" if ranks else ""
        whole = sum(module.kind == "lokr" and not module.rank for module in own)
        text += f", {whole} of two whole factors" if whole else ""
        found.append((part.replace("_", " "), text))
    return found


def _said(metadata: Mapping[str, str]) -> dict[str, Rows]:
    """What the metadata tells of training, words, and origin."""
    training = [(words, _value(key, metadata[key])) for key, words in _TRAINING.items() if metadata.get(key)]
    about = [(name, metadata[f"modelspec.{name}"]) for name in _ABOUT if metadata.get(f"modelspec.{name}")]
    trigger = metadata.get("modelspec.trigger_phrase")
    words = [("trigger", trigger)] if trigger else []
    tags = _tags(metadata.get("ss_tag_frequency", ""))
    words += [("most frequent tags", ", ".join(f"{tag} ({count})" for tag, count in tags))] if tags else []
    hashes = [
        (name, metadata[key])
        for name, key in (("A1111, Civitai", "sshs_model_hash"), ("modelspec", "modelspec.hash_sha256"))
        if metadata.get(key)
    ]
    known = {*_TRAINING, *(f"modelspec.{name}" for name in _ABOUT), "ss_tag_frequency"}
    others = sum(key not in known for key in metadata)
    loads = metadata.get("ss_base_model_version")
    about += [("A1111 takes it for", loads)] if loads else []
    about += [("more entries", str(others))] if others else []
    return {"words": words, "training": training, "about": about, "hashes": hashes}


def _tags(text: str) -> list[tuple[str, int]]:
    """The most frequent tags of all folders."""
    try:
        tree = json.loads(text) if text else {}
        counts: Counter[str] = Counter()
        for folder_tags in tree.values():
            counts.update({str(tag).strip(): int(count) for tag, count in folder_tags.items()})
    except (ValueError, AttributeError, TypeError):
        return []
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TAGS]


def _value(key: str, text: str) -> str:
    if key != "ss_training_started_at":
        return text
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(float(text), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return text


def _counted(counts: Mapping[Any, int]) -> str:
    """16, or where there are several: 16 (x 560), 4 (x 20)."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    shown = sorted(counts.items(), key=lambda item: -item[1])
    text = ", ".join(f"{value} (x {count})" for value, count in shown[:4])
    return text + (", ..." if len(shown) > 4 else "")
