"""Where a run begins: at its base, at a checkpoint, or not at all since it is done."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_trainer import checkpoint, configfile, files, mirror
from sdxl_trainer.base import Base
from sdxl_trainer.checkpoint import Checkpoint, Damaged
from sdxl_trainer.config import Config
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import WORD_FILES
from sdxl_trainer.run import Start

# Options that may change when a run continues: they do not decide what a step computes.
FREE = (
    "preset",
    "output_dir",
    "cache.",
    "validation.",
    "log.",
    "export.",
    "hub.",
    "train.steps",
    "train.epochs",
    "train.micro_batch",
    "train.checkpoint",
    "train.gradient_checkpointing",
    "train.fused_backward",
    "train.memory",
    "train.shard",
    "train.hang_timeout",
    "train.validate_every",
    "train.workers",
    "model.path",
    "model.vae",
    "model.attention",
)
# Where pictures lie does not matter: the hash over pictures and captions tells whether they are the same.
PLACE = re.compile(r"data\.\d+\.(path|generate.*)")


@dataclass(frozen=True)
class Begin:
    checkpoint: Checkpoint | None
    steps: int  # optimizer steps of the whole run
    done: bool
    data_hash: str


def starting_point(
    config: Config, base: Base, start: Start, output: Path, stock: Stock, order: Plan, say: Callable[[str], None]
) -> Begin:
    """Choose the checkpoint, verify it, and refuse to continue another run's."""
    steps = config.train.steps or (config.train.epochs or 0) * order.steps_per_epoch
    data_hash = stock.data_hash
    last = _last_run(output)
    if start.mode == "new" and (last or checkpoint.found(output)):
        fix = "choose another output_dir, or delete this folder if you do not need it"
        raise UserError("--fresh: this folder already holds a run", str(output), fix)
    if start.mode in {"restart", "new"}:
        return Begin(None, steps, False, data_hash)
    if not checkpoint.found(output) and not (last and last.get("finished")) and config.train.checkpoint_mirror:
        mirror.newest(config.train.checkpoint_mirror, output, say)
    if start.mode == "continue" and last and last.get("finished") and last["steps"] >= steps:
        _refuse_another(last["config"], last["data_hash"], config, data_hash, str(output))
        for line in _too_late(last["config"], config, output):
            say(line)
        return Begin(None, steps, True, data_hash)
    chosen = _named(output, start, say) if start.mode == "checkpoint" else _newest(output, say)
    if chosen is None:
        if last and last.get("finished"):
            say(f"the run in this folder ended at step {last['steps']} without a checkpoint: its steps are taken again")
        return Begin(None, steps, False, data_hash)
    state = chosen.state()
    if start.mode == "continue":
        _refuse_another(state["config"], state["data"], config, data_hash, str(chosen.path))
        if state.get("unet") not in {None, unet_beside(config, base)}:
            what = "the base's UNet is not the one that this run began with"
            raise UserError(what, str(chosen.path), "set model.path back, or choose another output_dir for this base")
    else:
        found = differences(state["config"], config)
        _refuse_other_state(found, str(chosen.path))
        changed = [key for key, _, _ in found] + ["data"] * (state["data"] != data_hash)
        if changed:
            say(f"not an exact continuation, since these changed: {shortened(changed)}")
    # At its last step a run is not done: its pipeline may not have been written yet.
    return Begin(chosen, max(steps, chosen.step + start.at_least_one_step), False, data_hash)


def unet_beside(config: Config, base: Base) -> str | None:
    """The mark of the base's UNet, where that is not in the checkpoint and what learns depends on it."""
    needed = config.adapter or config.token or any(data.prior_prediction for data in config.data)
    return base.mark() if needed else None


def differences(old: dict[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """(option, then, now) of the options that decide what a step computes."""
    then, now = configfile.flat(_completed(old)), configfile.flat(config.model_dump(mode="json"))
    keys = [k for k in {**then, **now} if not k.startswith(FREE) and not PLACE.fullmatch(k)]
    return [(k, then.get(k), now.get(k)) for k in keys if then.get(k) != now.get(k)]


def _too_late(old: dict[str, Any], config: Config, output: Path) -> list[str]:
    """What was asked for after the end of a run and so is not done, with the commands that do it."""
    then, now = configfile.flat(_completed(old)), configfile.flat(config.model_dump(mode="json"))
    changed = [key for key in now if key.startswith("export.") and then.get(key) != now[key]]
    lines = []
    if changed:
        name, dtype = config.export.name or output.resolve().name, config.export.dtype
        words = f"sdxl convert {output / WORD_FILES[0]} {name}_emb.safetensors"
        whole = f"sdxl convert {output} {name}.safetensors" + (f" --dtype {dtype}" if dtype else "")
        commands = [words if kind == "embeddings" else whole for kind in dict.fromkeys(config.export.formats)]
        fix = "; ".join(commands) or "what is there stays as it is"
        lines.append(f"the run had ended when {shortened(changed)} changed, and writes no more files: {fix}")
    if config.hub.push and not then.get("hub.push"):
        lines.append(f"the run had ended when hub.push changed: sdxl push {output}")
    return lines


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the defaults of options that it was written without: it is older than they are."""
    try:
        return Config.model_validate_json(json.dumps(old)).model_dump(mode="json")
    except ValidationError:
        return old


def _refuse_another(old: dict[str, Any], old_data: str, config: Config, data_hash: str, where: str) -> None:
    changed = differences(old, config)
    if changed:
        key, then, now = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        what = f"this folder holds a run with {key} = {json.dumps(then)}, not {json.dumps(now)}{more}"
        raise UserError(what, where, f"set {key} back to continue that run, or choose another output_dir")
    if old_data != data_hash:
        what = "the pictures, captions, VAE or text encoders changed since this run began"
        raise UserError(what, where, "choose another output_dir for the changed data or model, or bring the old back")


def _refuse_other_state(changed: list[tuple[str, Any, Any]], where: str) -> None:
    """Whatever else may change from a named checkpoint on: an optimizer cannot go on with another's state."""
    for key, then, now in changed:
        if key in {"optimizer.name", "optimizer.master", "train.weights"}:
            what = f"this checkpoint holds the optimizer's state of a run with {key} = {then}, not {now}"
            raise UserError(what, where, f"set {key} back, or begin a new run from its weights")


def _last_run(output: Path) -> dict[str, Any] | None:
    path = output / "manifest.json"
    if not path.is_file():
        return None
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        last = None
    if not isinstance(last, dict) or not {"steps", "config", "data_hash"} <= last.keys():
        what = "this file is not the record of a run, or damaged"
        raise UserError(what, str(path), "delete it, or choose another output_dir")
    return last


def _newest(output: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole. Damaged ones after it are set aside, under a name that tells so."""
    damaged: list[tuple[Checkpoint, Damaged]] = []
    for candidate in reversed(checkpoint.found(output)):
        try:
            checkpoint.verify(candidate)
        except Damaged as found:
            damaged.append((candidate, found))
            continue
        for bad, error in damaged:
            aside = bad.path.with_name(f"{bad.path.name}.damaged")
            files.remove(aside)
            bad.path.rename(aside)
            say(f"{bad.path} is not used ({error.what}); it is {aside.name} now")
        return candidate
    if damaged:
        raise damaged[0][1]
    return None


def _named(output: Path, start: Start, say: Callable[[str], None]) -> Checkpoint | None:
    """A checkpoint by `latest`, by its name in the output folder, or by its path."""
    assert start.checkpoint is not None
    if start.checkpoint == "latest":
        newest = _newest(output, say)
        if newest is None:
            say(f"there is no checkpoint in {output}: a new run begins")
        return newest
    given = Path(start.checkpoint).expanduser()
    for path in (output / start.checkpoint, given):
        if path.is_dir():
            number = path.name.removeprefix(checkpoint.PREFIX)
            if not number.isdigit():
                raise UserError(
                    f"'{path.name}' is not a checkpoint's name", str(path), "name a folder checkpoint-<step>"
                )
            return checkpoint.verify(Checkpoint(path, int(number)))
    names = [c.path.name for c in checkpoint.found(output)]
    there = f"there are: {shortened(names)}" if names else "there is none yet"
    raise UserError(f"there is no checkpoint '{start.checkpoint}'", str(output), f"name one that exists; {there}")
