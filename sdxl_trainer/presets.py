"""Presets: versioned starting points, one TOML file each in assets/presets.

A file holds the options that the preset sets, under the names of the config, and a section `[preset]` that says what
it is for and how many steps. `[data]` is for each data set. A published file is never changed: other values are a new
version, so that `preset = "lora-character@1"` means the same for ever.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer.errors import UserError, closest

if TYPE_CHECKING:
    from sdxl_trainer.config import Config

FOLDER = Path(__file__).parent / "assets" / "presets"
DEFAULT = "lora-character"
# Options that `train.memory` chooses: under it a preset's values for them are no limits, as the file's own are.
PLANNED = ("micro_batch", "gradient_checkpointing", "fused_backward")


@dataclass(frozen=True)
class Preset:
    """`views`: how often each picture is seen, within `steps` (fewest, most); `warmup`: share of the steps; `caption`:
    of pictures that have none; `values`: sections of the config."""

    name: str
    what: str
    pictures: tuple[int, int]
    views: int
    steps: tuple[int, int]
    warmup: float
    caption: str
    values: Mapping[str, Any]
    # The same pictures are seen under it too, to keep what the base makes of the class.
    class_caption: str | None = None

    @property
    def batch(self) -> int:
        """Pictures of a step under their own captions."""
        return self.values["train"]["batch_size"] // (2 if self.class_caption else 1)

    def steps_for(self, pictures: int) -> int:
        """Optimizer steps that show each of so many pictures `views` times, within the preset's limits."""
        low, high = self.steps
        return min(high, max(low, ceil(pictures * self.views / self.batch)))


def names() -> list[str]:
    """All presets with their versions, the latest version of each first."""
    found = [path.stem.split("@") for path in FOLDER.glob("*@*.toml")]
    return [f"{name}@{version}" for name, version in sorted(found, key=lambda pair: (pair[0], -int(pair[1])))]


def read(name: str, where: str = "--preset") -> Preset:
    """A preset by its name, with or without a version: without, the latest. UserError names the closest one."""
    known = names()
    full = next((found for found in known if name in (found, found.partition("@")[0])), None)
    if full is None:
        kind, at, version = name.partition("@")
        versions = [found for found in known if found.partition("@")[0] == kind]
        if at and versions:
            what = f"there is no version '{version}' of the preset '{kind}'"
            raise UserError(what, where, f"versions: {', '.join(reversed(versions))}")
        kinds = dict.fromkeys(found.partition("@")[0] for found in known)
        raise UserError(f"there is no preset '{name}'", where, f"{closest(kind, kinds)} (sdxl presets shows them all)")
    tree = tomllib.loads((FOLDER / f"{full}.toml").read_text(encoding="utf-8"))
    about: dict[str, Any] = tree.pop("preset")
    about |= {key: tuple(about[key]) for key in ("pictures", "steps")}
    return Preset(name=full, values=tree, **about)


def under(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """The config's plain data with the values of its preset wherever it gives none of its own."""
    name = tree.get("preset")
    if not isinstance(name, str):
        return tree
    if "@" not in name:
        fix = f'write preset = "{read(name, f"{where}, preset").name}", which keeps its meaning'
        raise UserError(f"preset = '{name}' has no version", f"{where}, preset", fix)
    merged = dict(tree)
    for section, values in read(name, f"{where}, preset").values.items():
        given = tree.get(section, [] if section == "data" else {})
        if section == "data" and isinstance(given, list):
            merged[section] = [{**values, **entry} if isinstance(entry, dict) else entry for entry in given]
        elif isinstance(given, dict):
            merged[section] = {**(unplanned(values) if section == "train" and "memory" in given else values), **given}
    return merged


def unplanned(train: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values for training, without those that only say how much memory it had in mind."""
    return {option: value for option, value in train.items() if option not in PLANNED}


def effective_rate(config: "Config") -> tuple[float, str] | None:
    """Learning rate x alpha / rank: how fast an adapter of low rank changes its layers, whatever its scale; and how it
    was reckoned. None without such an adapter, or where the optimizer finds the rate."""
    adapter, rate = config.adapter, config.train.learning_rate
    if adapter is None or adapter.kind in {"oft", "boft"} or config.optimizer.name == "prodigy":
        return None
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    divisor, word = (sqrt(adapter.rank), f"sqrt({adapter.rank})") if adapter.rslora else (adapter.rank, adapter.rank)
    return rate * alpha / divisor, f"learning rate {rate:g} x alpha {alpha:g} / rank {word}"


def differences(config: "Config") -> list[tuple[str, Any, Any]]:
    """(option, what the config has, what its preset has) wherever they are not the same."""
    if config.preset is None:
        return []
    found = []
    for section, values in read(config.preset, "preset").values.items():
        given = getattr(config, section)
        entries = [(f"data.{i}", data) for i, data in enumerate(given)] if section == "data" else [(section, given)]
        for place, entry in entries:
            for option, expected in values.items():
                value = getattr(entry, option)
                plain = list(value) if isinstance(value, tuple) else value
                if plain != expected:
                    found.append((f"{place}.{option}", plain, expected))
    return found


def listing() -> str:
    """All presets, a few lines each."""
    lines = []
    for name in names():
        preset = read(name)
        few, many = preset.pictures
        low, high = preset.steps
        rate = _effective(preset)
        lines += [
            f"{name:<20} {preset.what}",
            f"{'':<20} {few:,} to {many:,} pictures, each seen {preset.views} times, {low:,} to {high:,} steps",
            *([f"{'':<20} effective learning rate {rate}"] if rate else []),
            "",
        ]
    lines += [
        "sdxl presets NAME            every value that one sets",
        'sdxl train PHOTOS/ --trigger "sks dog" --preset NAME',
    ]
    return "\n".join(lines) + "\n"


def shown(name: str) -> str:
    """Every value that a preset sets, with what it is reckoned from."""
    preset = read(name, "sdxl presets")
    few, many = preset.pictures
    low, high = preset.steps
    rows = {
        "for": f"{few:,} to {many:,} pictures",
        "train.steps": f"pictures x {preset.views} / {preset.batch}, at least {low:,}, at most {high:,}",
        **({"schedule.warmup_steps": f"{preset.warmup:.0%} of the steps"} if preset.warmup else {}),
        "data.caption": f'"{preset.caption}" where a picture has none',
    }
    if preset.class_caption:
        rows["data.1.prior_prediction"] = f'the same pictures as "{preset.class_caption}"'
    for section, values in preset.values.items():
        rows |= {f"{section}.{option}": _word(value) for option, value in values.items()}
    rate = _effective(preset)
    rows |= {"effective learning rate": rate} if rate else {}
    lines = [f"{preset.name}: {preset.what}", *(f"  {name:<28} {value}" for name, value in rows.items())]
    comments = re.findall(r"^# ?(.*)$", (FOLDER / f"{preset.name}.toml").read_text(encoding="utf-8"), re.M)
    return "\n".join([*lines, "", *comments]) + "\n"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, str) else json.dumps(value)


def _effective(preset: Preset) -> str | None:
    from sdxl_trainer.configfile import validated

    data = [{"path": "pictures"}]
    tree = {"output_dir": "run", "model": {"path": "base"}, "data": data, "train": {"steps": 1}, "preset": preset.name}
    found = effective_rate(validated(tree, preset.name))
    return f"{found[0]:g} = {found[1]}" if found else None
