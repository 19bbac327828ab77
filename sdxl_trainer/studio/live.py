"""What a run is doing, read from what it leaves on disk; parts of its page as the report draws them."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_trainer import configfile, report, wishes
from sdxl_trainer.errors import UserError
from sdxl_trainer.report import pictures, records, sections, use
from sdxl_trainer.report.words import number, part
from sdxl_trainer.studio import jobs, settings
from sdxl_trainer.studio.jobs import Job
from sdxl_trainer.studio.workspace import Workspace

# "steps 12/550  2.1/s, 4:12 left ...": what `log.Console` says where there is no terminal.
PROGRESS = re.compile(r"^(?P<what>[a-z][\w ]{0,40}?) (?P<done>\d+)/(?P<total>\d+)\b(?P<rest>.*)$")
PAUSED = "paused after step"  # how a run says that it holds
RECENT = 20  # steps whose speed tells how long the rest will take
LAST = 16_000  # bytes at the end of metrics.jsonl that are looked at for them
CHECKPOINT = "checkpoint-"


def snapshot(workspace: Workspace, queue: jobs.Jobs) -> dict[str, Any]:
    """Everything that the page watches: jobs, and where each run is. Small and cheap: it is made twice a second."""
    queue.tick()
    found = told(workspace, queue)
    return {"jobs": found, "runs": [summary(workspace, name, found) for name in workspace.names()[:60]]}


def told(workspace: Workspace, queue: jobs.Jobs) -> list[dict[str, Any]]:
    """The latest jobs with how far each is."""
    return [{**jobs.as_json(job), **progress(workspace, queue, job)} for job in queue.all()[:40]]


def progress(workspace: Workspace, queue: jobs.Jobs, job: Job) -> dict[str, Any]:
    """How far a job is; of one that failed the three lines that say why."""
    if job.state in {"queued", "done"}:
        return {}
    output = queue.output(job, 8000)
    if job.state != "running":
        return {"problem": problem(output)} if job.state in {"failed", "lost"} else {}
    lines = [line for line in output.replace("\r", "\n").split("\n") if line.strip()]
    told: dict[str, Any] = {"says": lines[-1][:300] if lines else "starting", "memory": jobs.memory(job)}
    turns = [line for line in lines if line.startswith((PAUSED, "goes on"))]
    told["paused"] = bool(turns) and turns[-1].startswith(PAUSED)
    for line in reversed(lines):
        match = PROGRESS.match(line)
        if match:
            return {**told, "what": match["what"], "done": int(match["done"]), "total": int(match["total"])}
    return told


def problem(output: str) -> dict[str, str] | None:
    """The last message for the user in a job's output: what, where, and how to mend it; else its last line."""
    found = re.findall(r"^error: (.*)\n   at: (.*)\n  fix: (.*)$", output, re.MULTILINE)
    if found:
        what, where, fix = found[-1]
        return {"what": what, "where": where, "fix": fix}
    lines = [line for line in output.split("\n") if line.strip()]
    what = lines[-1][:500] if lines else "it ended without a word"
    return {"what": what, "where": "output of the command", "fix": "read the output below"}


# Options whose values may say what somebody's pictures show, or where they lie.
PRIVATE = re.compile(r"(path|prompts?|caption\w*|trigger|negative|output_dir|author|description|id|start|init|name)$")


def helpful(workspace: Workspace, queue: jobs.Jobs, job: Job) -> str:
    """What somebody who is asked for help needs to know: versions, the command, the options, the end of the output;
    without captions, prompts, names and places of folders."""
    known = ("sdxl-trainer", "torch", "diffusers", "transformers", "accelerate", "peft")
    versions = [f"{name} {_version(name)}" for name in known]
    path = settings.source(workspace, job.name)
    tree = settings.parsed(settings.read(path), "")[0] if path.is_file() else {}
    values = configfile.flat(tree).items()
    options = [f"{k} = {'(left out)' if PRIVATE.search(k) else json.dumps(v)}" for k, v in values]
    command = " ".join(["sdxl", *job.arguments[:1], "..."])
    output = queue.output(job, 8000)
    for folder in (workspace.folder, Path.home()):
        output = output.replace(str(folder), "~")
    head = [
        f"Python {platform.python_version()}, {platform.platform()}",
        ", ".join(versions),
        f"{command}: {job.state}",
    ]
    return "\n".join([*head, "", *options, "", output])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def summary(workspace: Workspace, name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run in one line: what it is doing, its step, and stamps that change when there is more to see."""
    folder = workspace.run(name)
    own = next((job for job in found if job["kind"] == "train" and job["name"] == name), None)
    rows = last_rows(folder / "metrics.jsonl")
    made: dict[str, Any] = {"name": name, "job": own["id"] if own else None, "state": own["state"] if own else "new"}
    last = rows[-1] if rows else {}
    made |= {key: number(last.get(key)) for key in ("step", "loss", "learning_rate", "epoch")}
    speeds = [v for row in rows if (v := number(row.get("samples_per_second")))]
    made["speed"] = statistics.median(speeds) if speeds else None
    made["steps"] = steps(folder)
    if own is None and rows:
        made["state"] = "done" if made["steps"] and (made["step"] or 0) >= made["steps"] else "stopped"
    if own and own["state"] == "running" and rows and speeds and made["steps"]:
        images = number(last.get("images")) or 1
        made["left"] = max(0.0, (made["steps"] - (made["step"] or 0)) * images / made["speed"])
    if own and own["state"] == "running" and wishes.asked_to_pause(folder):
        made["state"] = "paused" if own.get("paused") else "pausing"
        made.pop("left", None)
    made["check"] = standing(workspace, name, found)
    made["stamps"] = [stamp(folder / n) for n in ("metrics.jsonl", "samples/samples.jsonl", "manifest.json")]
    return made


def standing(workspace: Workspace, name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the last check of a run came to: passed, or what stops the run; old if the config has changed since."""
    last = next((job for job in found if job["kind"] == "check" and job["name"] == name), None)
    if last is None or last["state"] not in {"done", "failed"}:
        return {"state": "running" if last and last["state"] in {"queued", "running"} else "none"}
    if stamp(settings.source(workspace, name)) > 1e9 * last["started"]:
        return {"state": "old"}
    told = {"state": "passed"} if last["state"] == "done" else {"state": "stops", "problem": last["problem"]}
    return told | {"since": last["started"]}


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of a metrics file, without reading all of it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LAST))
            lines = file.read().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for line in lines[-RECENT - 1 :]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def steps(folder: Path) -> int | None:
    """The steps that a run was asked for, where its config counts in steps."""
    try:
        tree = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = part(tree, "train", "steps")
    return value if isinstance(value, int) else None


def stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def page(workspace: Workspace, name: object) -> dict[str, Any]:
    """A run's page: numbers, curves and pictures as in its report, as HTML in which everything is escaped."""
    folder = workspace.run(name)
    if not any((folder / name).is_file() for name in records.FILES):
        return {"name": folder.name, "html": {}, "checkpoints": [], "files": []}
    run = records.read(folder)
    notices = [*run.notices, *report.not_finite(run)]
    drawn = pictures.write(run.samples, notices)
    return {
        "name": folder.name,
        "html": {
            "figures": sections.figures(run),
            "curves": report.curves(run),
            "pictures": drawn,
            "notes": sections.notes(notices),
            "use": use.section_body(run, use.command(run)),
            "timings": sections.timings(run),
        },
        "checkpoints": checkpoints(folder),
        "files": results(folder),
        "report": (folder / "report.html").is_file(),
        "model": (model := (folder / "model_index.json").is_file()),
        "adapter": (adapter := bool(part(run.config, "adapter") or part(run.config, "token"))),
        "result": model or (adapter and run.done),
        "prompt": next((sample.prompt for sample in run.samples if sample.prompt), ""),
    }


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    numbers = (path.name.removeprefix(CHECKPOINT) for path in folder.glob(f"{CHECKPOINT}*") if path.is_dir())
    return sorted(int(text) for text in numbers if text.isdigit())


def results(folder: Path) -> list[dict[str, Any]]:
    """Files that a finished run holds for other programs."""
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    return [{"name": path.name, "bytes": path.stat().st_size} for path in found]


def config_of(workspace: Workspace, name: object) -> dict[str, Any]:
    """The resolved config that a run wrote; the one that it was asked for if it has not begun."""
    for path in (workspace.run(name) / "config.toml", workspace.config(name)):
        if path.is_file():
            try:
                return tomllib.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
    raise UserError("this run has no config that can be read", str(name)[:80], "choose another run")


def notes(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl beside pictures, of those whose file is there."""
    try:
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("file"), str) and (folder / row["file"]).is_file():
            found.append(row)
    return found
