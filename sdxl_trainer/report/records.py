"""Reading what a run leaves in its folder. Every part may be missing; what cannot be read is said, not hidden."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.report.words import clipped, number, table

FILES = ("config.toml", "manifest.json", "metrics.jsonl", "samples/samples.jsonl", "validation.jsonl")


@dataclass(frozen=True)
class Sample:
    """One picture that a run drew."""

    step: int
    file: Path
    prompt: str
    seed: str
    weights: str


@dataclass(frozen=True)
class Run:
    """Everything that the page shows. `notices` are sentences about what could not be read or shown."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[Sample]
    validation: list[dict[str, Any]]
    notices: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name or "run"

    @property
    def last_step(self) -> int:
        steps = [self.metrics[-1]["step"]] if self.metrics else [sample.step for sample in self.samples]
        return max(steps, default=0)

    @property
    def planned(self) -> float | None:
        """The steps that the run was asked for, where the config counts in steps."""
        return number(table(self.config, "train").get("steps"))

    @property
    def done(self) -> bool:
        # A run that its validation loss ended is done too: then as many steps were taken as it wanted.
        wanted = number(self.manifest.get("steps_taken")) or self.planned
        complete = wanted is None or self.last_step >= wanted
        return bool(self.manifest.get("finished")) and complete


def read(folder: Path) -> Run:
    """The run in a folder."""
    if not any((folder / name).is_file() for name in FILES):
        what = f"no run in '{folder}'" if folder.is_dir() else f"there is no folder '{folder}'"
        raise UserError(what, str(folder), "give the output_dir of a run; it holds config.toml and metrics.jsonl")
    notices: list[str] = []
    config_text, config = _config(folder / FILES[0], notices)
    return Run(
        folder=folder,
        config=config,
        config_text=config_text,
        manifest=_manifest(folder / FILES[1], notices),
        metrics=_metrics(folder / FILES[2], notices),
        samples=_samples(folder / FILES[3], notices),
        validation=list(_rows(folder / FILES[4], notices)),
        notices=notices,
    )


def _text(path: Path, notices: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notices.append(f"{path.name} could not be read: {error.strerror}.")
        return ""


def _config(path: Path, notices: list[str]) -> tuple[str, dict[str, Any]]:
    text = _text(path, notices)
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        notices.append(f"config.toml is not valid TOML: {error}.")
        return text, {}


def _manifest(path: Path, notices: list[str]) -> dict[str, Any]:
    text = _text(path, notices)
    try:
        tree = json.loads(text or "{}")
    except ValueError as error:
        notices.append(f"manifest.json is not valid JSON: {error}.")
        return {}
    return tree if isinstance(tree, dict) else {}


def _rows(path: Path, notices: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file that carry a step."""
    unread = 0
    for line in filter(str.strip, _text(path, notices).split("\n")):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        step = number(row.get("step")) if isinstance(row, dict) else None
        if step is None or step < 0 or not float(step).is_integer():
            unread += 1
        else:
            yield {**row, "step": int(step)}
    if unread:
        lines = plural(unread, "line that is", "lines that are")
        notices.append(f"{path.name} has {lines} not a record of a step.")


def _metrics(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """Rows by step. After an interruption steps are taken again: the later row is what the model went through."""
    by_step = {row["step"]: row for row in _rows(path, notices)}
    return [by_step[step] for step in sorted(by_step)]


def _samples(path: Path, notices: list[str]) -> list[Sample]:
    found: dict[tuple[Any, ...], Sample] = {}
    outside: list[str] = []
    for row in _rows(path, notices):
        file = _inside(path.parent, row.get("file"))
        if file is None:
            outside.append(clipped(str(row.get("file")), 80))
            continue
        prompt, seed = str(row.get("prompt") or ""), row.get("seed")
        weights = str(row.get("weights") or "raw")
        sample = Sample(row["step"], file, prompt, "" if seed is None else clipped(str(seed), 40), weights)
        found[sample.step, prompt, sample.seed, weights] = sample
    if outside:
        notices.append(f"Not shown, because they are not files in samples/: {shortened(outside, 3)}.")
    return sorted(found.values(), key=lambda sample: sample.step)


def _inside(folder: Path, name: Any) -> Path | None:
    """The file of that name, if it is one below the folder: a record must not be able to show other files."""
    if not isinstance(name, str):
        return None
    try:
        file = (folder / name).resolve()
        return file if file.is_relative_to(folder.resolve()) and file.is_file() else None
    except (OSError, ValueError):
        return None
