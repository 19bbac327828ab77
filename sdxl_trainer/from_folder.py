"""`sdxl train photos/ --trigger "sks dog"`: from a folder of pictures to a config file, which is written for the user.

The file is `runs/<name>.toml` and trains into `runs/<name>`. It is written once. Where it exists it is used as it is,
and what it says otherwise than would be written today is told; a command that contradicts it is refused.
"""

import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer import configfile, files, presets
from sdxl_trainer.config import Config, Data
from sdxl_trainer.data import sources
from sdxl_trainer.data.records import Record
from sdxl_trainer.data.sources import beside, metadata
from sdxl_trainer.data.sources.extras import KOHYA
from sdxl_trainer.data.sources.tree import PICTURES, Tree, scan
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.formats import single_file
from sdxl_trainer.formats.folder import MICRO, read_config
from sdxl_trainer.presets import Preset
from sdxl_trainer.schedule import is_edm

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
RUNS = Path("runs")
MOST_REPEATS = 1000  # folders named 2024_summer are not kohya's


@dataclass(frozen=True)
class Wish:
    """What the command says besides the folder; None where it says nothing."""

    trigger: str | None = None
    preset: str | None = None
    model: str | None = None
    name: str | None = None

    def refuse_any(self, path: Path) -> None:
        """These say how to begin from a folder; a config file says it all itself."""
        options = {"trigger": "data.0.trigger", "preset": "preset", "model": "model.path", "name": "output_dir"}
        for option, place in options.items():
            value = getattr(self, option)
            if value is not None and not path.exists():
                raise UserError(f"there is no folder '{path}'", "command line", "give the folder of your pictures")
            if value is not None and path.suffix.lower() in PICTURES:
                raise UserError(f"'{path}' is one picture", "command line", f"give its folder: {path.parent}")
            if value is not None:
                what = f"--{option} is for beginning from a folder, and '{path}' is none"
                raise UserError(what, "command line", f'write {place}="{value}" in the place of --{option}')


def load(folder: Path, wish: Wish, overrides: Sequence[str]) -> Config:
    """The config of a folder: that of its file, which is written if there is none."""
    _refuse_runs(folder)
    name = wish.name or folder.resolve().name
    if Path(name).name != name or not name.strip("."):
        raise UserError(f"'{name}' cannot be the name of a run", "--name", "give a word without slashes")
    path = RUNS / f"{name}.toml"
    if path.is_file():
        return _continued(path, folder, wish, name, overrides)
    tree, notes = begun(folder, wish, name)
    configfile.validated(tree, str(path))
    with files.explained(RUNS):
        RUNS.mkdir(parents=True, exist_ok=True)
        files.write_text(path, _text(tree, notes, name))
    config = configfile.load(path, overrides)
    _say(f"wrote {path}; to train otherwise edit it, or give section.key=value")
    for line in _settings(tree, notes):
        _say(f"  {line}")
    return config


def _continued(path: Path, folder: Path, wish: Wish, name: str, overrides: Sequence[str]) -> Config:
    """What the file says, after what the command contradicts is refused and what differs is told."""
    there = configfile.load(path)
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    told = Wish(wish.trigger or there.data[0].trigger, wish.preset or there.preset, wish.model or there.model.path)
    tree, _ = begun(folder, told, name)
    wanted, found = configfile.flat(tree), configfile.flat(given)
    said = {"data.0.path": folder, "data.0.trigger": wish.trigger, "preset": wish.preset, "model.path": wish.model}
    for option in [option for option, value in said.items() if value is not None]:
        if found.get(option) != wanted.get(option):
            what = f"{path} exists and says {option} = {found.get(option)!r}; the command says {wanted.get(option)!r}"
            fix = "give --name ANOTHER to begin a second run, edit the file, or delete it"
            raise UserError(what, str(path), fix)
    _say(f"using {path} as it is")
    for option in sorted(found.keys() | wanted.keys()):
        own, new = found.get(option), wanted.get(option)
        if own != new:
            is_so = f"{option} is not given" if own is None else f"{option} = {json.dumps(own)}"
            would = "leave it out" if new is None else f"give {json.dumps(new)}"
            _say(f"  {is_so}; the preset and the folder would {would}")
    return configfile.load(path, overrides)


def begun(folder: Path, wish: Wish, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A new config's plain data, and a comment for what is not the preset's."""
    preset = presets.read(wish.preset or presets.DEFAULT)
    model = str(MICRO) if wish.model == "micro" else wish.model or BASE
    if not Path(model).expanduser().exists() and not sources.HUB_ID.fullmatch(model):
        raise UserError(
            f"there is no model '{model}'", "--model", "give a folder, a .safetensors file, a hub id, or micro"
        )
    sections = {key: dict(value) for key, value in preset.values.items()}
    data: dict[str, Any] = {"path": str(folder), **sections.pop("data")}
    found = guessed(folder)
    data |= {option: value for option, (value, _) in found.items()}
    notes = {f"data.0.{option}": why for option, (_, why) in found.items()}
    if wish.trigger is not None:
        data |= {"trigger": wish.trigger, "caption": preset.caption.replace("{trigger}", wish.trigger)}
        notes["data.0.trigger"] = "put first where a caption does not hold it"
        notes["data.0.caption"] = "of pictures that have none"
    if wish.model == "micro":
        notes["model.path"] = "draws flat shapes: its pictures show how a run goes, not what SDXL makes of yours"
    _fit_to_schedule(model, sections.get("objective", {}), notes)
    small = _fit_to_model(model, data, notes)
    records = _records(folder, data, wish)
    count = len(records)
    steps = preset.steps_for(count)
    # What the preset says of memory is not written down: it would bind `train.memory`, as the user's own words do.
    train = {"steps": steps, **presets.unplanned(sections.pop("train"))}
    if small:
        notes["train.gradient_checkpointing"] = "so small a model needs no saving of memory"
        train["gradient_checkpointing"] = False
    notes["train.steps"] = f"{plural(count, 'picture')}, each seen {steps * preset.batch / count:.3g} times"
    every = max(1, steps // 4)
    train |= {"checkpoint_every": every, "checkpoints_limit": 2}
    tree: dict[str, Any] = {
        "preset": preset.name,
        "output_dir": str(RUNS / name),
        "model": {"path": model},
        "data": [data, *_class(preset, data, wish, notes)],
        "train": train,
        **sections,
    }
    if preset.warmup:
        tree["schedule"]["warmup_steps"] = max(1, round(preset.warmup * steps))
        notes["schedule.warmup_steps"] = f"{preset.warmup:.0%} of the steps"
    prompt = data.get("caption") or records[0].captions[0]
    train["validate_every"] = every
    tree["validation"] = {"prompts": [prompt], "images": 2, "at_start": True}
    return tree, notes


def guessed(folder: Path) -> dict[str, tuple[Any, str]]:
    """How a folder says that it is to be read, and why: options of a data set. Where the captions are is such an
    option if none are where they are looked for, and one kind of file seems to hold them."""
    options: dict[str, tuple[Any, str]] = {}
    if _kohya(folder):
        options["kohya_folders"] = (True, "folders named 10_words: seen 10 times an epoch")
    tree = scan(folder, "folder", Data.model_fields["mask_suffix"].default)
    if not tree.metadata and not beside.used(Data(path=str(folder)), tree, tree.pictures):
        found = beside.overlooked(tree, tree.pictures)
        if len(found) == 1 and _readable(
            tree, Data.model_validate({"path": str(folder), found[0].option: found[0].value})
        ):
            options[found[0].option] = (found[0].value, "captions are there")
    return options


def _readable(tree: Tree, data: Data) -> bool:
    """Whether the file of captions that a data set names has the columns that are looked for."""
    try:
        return data.metadata is None or bool(list(metadata.rows(tree, data, "", metadata.tables(tree, data, ""))))
    except UserError:
        return False


def _class(preset: Preset, data: dict[str, Any], wish: Wish, notes: dict[str, str]) -> list[dict[str, Any]]:
    """The same pictures as any of their class, whose looks are to stay what the base makes of them."""
    if preset.class_caption is None:
        return []
    word = (wish.trigger or "").strip().partition(" ")[2].strip()
    if not word:
        what = f"the preset {preset.name} needs a trigger with the class in it, such as 'sks dog'"
        raise UserError(what, "--trigger", 'write the new word and its class: --trigger "sks dog"')
    notes["data.1.prior_prediction"] = "what the base makes of the class stays"
    own = {key: value for key, value in data.items() if key not in {"trigger", "caption", "kohya_folders"}}
    caption = preset.class_caption.replace("{class}", word)
    return [{**own, "caption": caption, "caption_only": True, "prior_prediction": True, "regularisation": True}]


def _fit_to_model(model: str, data: dict[str, Any], notes: dict[str, str]) -> bool:
    """Pictures of the size that a model on disk says it draws; SDXL's is 1024, as in the presets. Whether the model is
    a small one."""
    try:
        side = (
            json.loads((Path(model).expanduser() / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
            * 8
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
    preset = data["resolution"]
    if side != preset:
        data["resolution"] = side
        notes["data.0.resolution"] = f"the model's own; the preset's is {preset}"
        if data.get("buckets") == "area":
            data["bucket_step"] = max(8, 64 * side // 1024 // 8 * 8)
    return side < 512


def _fit_to_schedule(model: str, objective: dict[str, Any], notes: dict[str, str]) -> None:
    """No Min-SNR on a base on disk whose noise levels it does not go with."""
    path = Path(model).expanduser()
    try:
        single = path.suffix == ".safetensors"
        schedule = {} if single else read_config("scheduler", path)
        zero = single_file.about(path).zero_terminal_snr if single else schedule.get("rescale_betas_zero_snr")
    except (UserError, OSError):
        return
    if "snr_gamma" in objective and (zero or is_edm(schedule)):
        objective["weighting"] = "prediction" if zero else "sample"
        why = "passes over the pure noise that this model begins with" if zero else "is not defined for EDM's noise"
        notes["objective.weighting"] = f"not the preset's snr_gamma = {objective.pop('snr_gamma'):g}, which {why}"


def _records(folder: Path, data: dict[str, Any], wish: Wish) -> Sequence[Record]:
    """The pictures there are; what is wrong with the folder is told before a file is written."""
    try:
        return sources.records(Data.model_validate(data), seed=0, where="folder")
    except UserError as error:
        if wish.trigger is None and "no caption" in error.what:
            fix = f'give --trigger "the words that shall call it up", or {error.fix}'
            raise UserError(error.what, error.where, fix) from None
        raise


def _kohya(folder: Path) -> bool:
    """Whether the folder, or every folder in it and nothing else, is named in kohya's way."""
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    named = [_repeats(entry.name) for entry in inside if entry.is_dir()]
    beside = any(entry.suffix.lower() in PICTURES for entry in inside)
    return _repeats(folder.resolve().name) or (bool(named) and all(named) and not beside)


def _repeats(name: str) -> bool:
    found = KOHYA.fullmatch(name)
    return found is not None and 1 <= int(found[1]) <= MOST_REPEATS


def _refuse_runs(folder: Path) -> None:
    if (folder / "manifest.json").is_file() and (folder / "config.toml").is_file():
        what = "this folder is the result of a run, not a folder of pictures"
        raise UserError(what, str(folder), f"sdxl train {folder / 'config.toml'} continues it")
    if (folder / "model_index.json").is_file():
        what = "this folder holds a model, not pictures"
        raise UserError(what, str(folder), f"sdxl train PHOTOS/ --model {folder}")


def _text(tree: dict[str, Any], notes: dict[str, str], name: str) -> str:
    head = (
        f"# Written once by `sdxl train {tree['data'][0]['path']}`, from the preset and what lies in the folder.\n"
        f"# Change what you like: the same command, or `sdxl train {RUNS / name}.toml`, uses the file as it is.\n"
    )
    return head + configfile.written(tree, notes)


def _settings(tree: dict[str, Any], notes: dict[str, str]) -> list[str]:
    """Every value that is written, with its reason, and the effective learning rate."""
    flat = configfile.flat(tree)
    width = max(len(option) for option in flat)
    reasons = {option: f"   ({notes[option]})" if option in notes else "" for option in flat}
    words = {option: json.dumps(value, ensure_ascii=False) for option, value in flat.items()}
    lines = [f"{option:<{width}}  {words[option]}{reasons[option]}" for option in flat]
    rate = presets.effective_rate(configfile.validated(tree, "folder"))
    return lines + ([f"effective learning rate {rate[0]:g} = {rate[1]}"] if rate else [])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
