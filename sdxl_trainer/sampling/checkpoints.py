"""A checkpoint of a fine-tune as a model to draw with: what it holds, and links to the rest of its base."""

import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_trainer import base, files
from sdxl_trainer.base import Base
from sdxl_trainer.config import Model
from sdxl_trainer.data.cache import key
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import ADAPTER_FILE, WORD_FILES

STATE = "state.json"
# What a run, or a checkpoint of it, holds beside its base -> the setting of a picture that it is.
ADDED = {"loras": ADAPTER_FILE, "embeddings": WORD_FILES[0]}
DEFAULT = "EulerDiscreteScheduler"  # that of SDXL base
# Schedulers of diffusers that can begin without signal; the others pass over rescale_betas_zero_snr.
FROM_ZERO = (
    DEFAULT,
    *("EulerAncestralDiscreteScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler"),
    *("DDPMParallelScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"),
    "TCDScheduler",
)


def scheduler_config(config: dict[str, Any], prediction: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler that fits how the model was trained: used for previews and saved with the model."""
    config = {**config, "prediction_type": prediction}
    if zero_terminal_snr or config.get("rescale_betas_zero_snr"):
        # Sampling must start at the terminal timestep, which only trailing spacing visits (Lin et al. 2024, 3.3).
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if config.get("_class_name", DEFAULT) not in FROM_ZERO:
            config["_class_name"] = DEFAULT
    return config


def model_index(of: Base, scheduler: dict[str, Any]) -> dict[str, Any]:
    """The base's model_index.json, with the scheduler's class where that is another now."""
    kind = scheduler.get("_class_name")
    changed = kind != of.config("scheduler").get("_class_name")
    return of.config("model_index") | ({"scheduler": ["diffusers", kind]} if changed else {})


def added(folder: Path) -> tuple[str, dict[str, tuple[str, ...]]] | None:
    """The base of a run or a checkpoint that holds no model, but an adapter or new words, and these by the settings of
    a picture. None for everything else, and where nothing says which base it was."""
    own: dict[str, tuple[str, ...]] = {
        setting: (str(folder),) for setting, name in ADDED.items() if (folder / name).is_file()
    }
    if not own or (folder / "model_index.json").is_file() or (folder / "unet").is_dir():
        return None
    if (folder / STATE).is_file():
        return str(_config(folder)["model"]["path"]), own
    try:
        return str(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["model"]["path"]), own
    except (OSError, ValueError, KeyError, TypeError):
        return None


def assembled(folder: Path, cache: Path) -> Path | None:
    """A model in the cache with a checkpoint's parts, the averaged ones where there are some; None if the folder is no
    checkpoint. UserError for one that holds no model."""
    if not (folder / STATE).is_file():
        return None
    config = _config(folder)
    if not (folder / "unet" / "config.json").is_file():
        what, own = "this checkpoint holds no model, but an adapter or new words", config["model"]["path"]
        raise UserError(what, str(folder), f"sdxl sample {own} --lora {folder}")
    options = Model.model_validate_json(json.dumps(config["model"]))
    if options.variant:
        what = f"a checkpoint of a base of the variant '{options.variant}' cannot be drawn with by itself"
        raise UserError(what, str(folder), "let the run end and draw with its result")
    found = base.resolve(options, cache)
    changed = (folder / STATE).stat().st_mtime_ns
    target = cache / f"checkpoint-{key(str(folder.resolve()), changed, str(found.folder))[:16]}"
    if not target.is_dir():
        files.write_atomically(target, partial(_link, checkpoint=folder.resolve(), of=found, config=config))
    return target


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        what = f"{STATE} of this checkpoint cannot be read"
        raise UserError(what, str(folder), "choose another checkpoint") from None


def _link(folder: Path, *, checkpoint: Path, of: Base, config: dict[str, Any]) -> None:
    """Links to every part, the model's index, and the scheduler that fits how it is trained."""
    folder.mkdir()
    for part in (part for part in of.parts if part != "scheduler"):
        places = [checkpoint / f"{part}_ema", checkpoint / part, of.part(part)]
        (folder / part).symlink_to(next(place for place in places if place.is_dir()).resolve())
    objective, scheduler = config["objective"], of.config("scheduler")
    prediction = objective["prediction"] or scheduler.get("prediction_type", "epsilon")
    (folder / "scheduler").mkdir()
    made = scheduler_config(scheduler, prediction, objective["zero_terminal_snr"])
    files.write_json(folder / "scheduler" / "scheduler_config.json", made)
    files.write_json(folder / "model_index.json", model_index(of, made))
