"""Pictures by any checkpoint, results for other programs: the command lines that do it."""

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import ADAPTER_FILE, WORD_FILES
from sdxl_trainer.report.words import part
from sdxl_trainer.studio import live
from sdxl_trainer.studio.workspace import Workspace, checked_name

LONGEST = 5000  # characters of a prompt
# Fields of the page and the flags of `sdxl sample` that they are.
NUMBERS = {"seed": "--seed", "images": "--images", "steps": "--steps", "guidance": "--guidance"}
SIDES = {"height": "--height", "width": "--width"}


def sample(workspace: Workspace, asked: Mapping[str, Any]) -> tuple[list[str], Path]:
    """`sdxl sample ...` for prompts with the base, a checkpoint or the result of a run, and its new folder."""
    name = checked_name(asked.get("run"))
    prompts = [text for text in str(asked.get("prompt") or "").split("\n") if text.strip()]
    if not prompts or sum(map(len, prompts)) > LONGEST:
        raise UserError("no prompt is given" if not prompts else "the prompts are too long", "prompt", "write a few")
    out = workspace.state / "tries" / f"{time.time_ns():020}"
    arguments = ["sample", *model(workspace, name, asked.get("at"), asked.get("weight"))]
    for prompt in prompts[:16]:
        arguments += [f"--prompt={prompt}"]
    if asked.get("negative"):
        arguments += [f"--negative={str(asked['negative'])[:LONGEST]}"]
    for key, flag in {**NUMBERS, **SIDES}.items():
        if asked.get(key) not in {None, ""}:
            value = asked[key]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{key} is not a number", key, "write a number")
            arguments += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return [*arguments, "--out", workspace.shown(out)], out


def model(workspace: Workspace, name: str, at: object, weight: object) -> list[str]:
    """What to draw with: "base", "result" or the step of a checkpoint."""
    folder = workspace.run(name)
    config = live.config_of(workspace, name)
    base = str(part(config, "model", "path"))
    if at == "base":
        return [base]
    if at != "result" and at not in live.checkpoints(folder):
        raise UserError(f"there is no checkpoint of step {str(at)[:20]}", name, "choose one of the list")
    path = folder if at == "result" else folder / f"{live.CHECKPOINT}{at}"
    if not path.is_dir():
        raise UserError("this run has no result yet", name, "choose a checkpoint, or the base")
    if not (part(config, "adapter") or part(config, "token")):
        return [workspace.shown(path)]
    strength = f":{weight:g}" if isinstance(weight, int | float) and weight != 1 else ""
    adapter = ["--lora", f"{workspace.shown(path)}{strength}"] if part(config, "adapter") else []
    words = path / WORD_FILES[0]
    return [base, *adapter, *(["--embedding", workspace.shown(words)] if words.is_file() else [])]


def export(workspace: Workspace, name: object, kind: object) -> list[str]:
    """`sdxl convert ...` that writes a run's result as one file for ComfyUI, A1111 and Forge."""
    folder = workspace.run(name)
    adapter = folder / ADAPTER_FILE
    target = workspace.shown(folder / f"{folder.name}.safetensors")
    if kind == "kohya" and adapter.is_file():
        return ["convert", workspace.shown(adapter), target, "--to", "kohya", "--overwrite"]
    if kind == "single" and (folder / "model_index.json").is_file():
        return ["convert", workspace.shown(folder), target, "--to", "single", "--dtype", "fp16", "--overwrite"]
    raise UserError(f"this run has no result that '{str(kind)[:20]}' is made of", folder.name, "let it end first")


def push(workspace: Workspace, name: object, repository: str | None, private: bool) -> list[str]:
    """`sdxl push ...` for a run's result."""
    named = [f"--id={repository}"] if repository else []
    return ["push", workspace.shown(workspace.run(name)), *named, "--private" if private else "--public"]


def bundle(workspace: Workspace, name: object) -> Path:
    """A .zip of what is shared of a run: files for other programs, card, report, pictures."""
    folder = workspace.run(name)
    if not (folder / "manifest.json").is_file():
        raise UserError("this run has left nothing to share yet", folder.name, "let it end first")
    chosen = [p for p in folder.glob("*") if p.is_file() and p.suffix in {".safetensors", ".md", ".html", ".toml"}]
    chosen = [p for p in chosen if p.name != "check.html"]  # it shows the pictures that were trained on
    chosen += [p for p in (folder / "samples").rglob("*.png") if p.is_file()]
    target = workspace.state / "bundles" / f"{folder.name}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # weights and pictures do not get smaller
        for path in chosen:
            archive.write(path, Path(folder.name) / path.relative_to(folder))
    return target
