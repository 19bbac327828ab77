"""What the page can ask for. Each is a plain function from (studio, what was sent) to what is answered; what takes
long becomes a command in the queue. The tables at the end say which address does what."""

import shlex
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer import publish, wishes
from sdxl_trainer.data.sources.tree import PICTURES
from sdxl_trainer.errors import UserError
from sdxl_trainer.report import compare as comparison
from sdxl_trainer.report import pictures as drawings
from sdxl_trainer.report import records
from sdxl_trainer.studio import album as albums
from sdxl_trainer.studio import jobs, live, remedies, settings, starts, trial, views, wording
from sdxl_trainer.studio.workspace import checked_name, inside

if TYPE_CHECKING:
    from sdxl_trainer.studio.app import Studio

Sent = Mapping[str, Any]
PAGE = 60  # pictures of a folder that are shown at a time
OUTPUT = ".html", ".png", ".safetensors"  # what of a run may be fetched


def begin(studio: "Studio", sent: Sent) -> Any:
    """What the page needs once: options, ways to start, and what there is."""
    return {
        "folder": str(studio.workspace.folder),
        "fields": settings.fields(),
        "first": settings.FIRST,
        "presets": starts.presets(),
        "chosen": [str(path) for path in studio.workspace.chosen()],
        "runs": studio.workspace.names(),
    }


def watched(studio: "Studio", sent: Sent) -> Any:
    return live.snapshot(studio.workspace, studio.jobs)


# Pictures and captions


def browse(studio: "Studio", sent: Sent) -> Any:
    return studio.workspace.below(sent.get("path"))


def choose(studio: "Studio", sent: Sent) -> Any:
    return {"folder": str(studio.workspace.choose(sent.get("path")))}


def pictures(studio: "Studio", sent: Sent) -> Any:
    """A page of a folder's pictures, those that a text is in or that lack a caption, and the tags of all."""
    album = _album(studio, sent)
    found = _found(album, sent.get("find"), sent.get("missing"))
    start = _whole(sent.get("from"), 0)
    shown = [
        {"name": e.name, "caption": e.caption[: albums.LONGEST], "source": e.source, "readonly": albums.readonly(e)}
        for e in found[start : start + PAGE]
    ]
    tags = wording.frequent(entry.caption for entry in album.entries.values())
    return {"pictures": shown, "found": len(found), "all": len(album.entries), "tags": tags}


def _found(album: albums.Album, text: object, missing: object) -> list[albums.Entry]:
    """Pictures in whose caption or name a text is, and of these, if wanted, those without a caption."""
    wanted = str(text or "").casefold()
    return [
        entry
        for entry in album.entries.values()
        if (not wanted or wanted in entry.caption.casefold() or wanted in entry.name.casefold())
        and not (missing and entry.caption)
    ]


def verdict(studio: "Studio", sent: Sent) -> Any:
    return views.verdict(_album(studio, sent), views.options(_tree(studio, sent)))


def crops(studio: "Studio", sent: Sent) -> Any:
    album = _album(studio, sent)
    found = views.crops(album, album.entry(sent.get("name")).name, views.options(_tree(studio, sent)))
    return found | {"beside": not album.tree.metadata}


def caption(studio: "Studio", sent: Sent) -> Any:
    """Save captions: {"captions": {name: new}, "before": {name: old}}."""
    given, before = sent.get("captions"), sent.get("before")
    if not isinstance(given, dict) or not isinstance(before, dict):
        raise UserError("no captions are given", "captions", "send them by the names of their pictures")
    with studio.lock:
        albums.write_captions(_album(studio, sent), given, before)
    return {"saved": len(given)}


def change(studio: "Studio", sent: Sent) -> Any:
    """What a change to all captions, or to those that are found, would make of them; with "apply" it is saved. Gives
    what is needed to undo it."""
    with studio.lock:
        album = _album(studio, sent)
        wanted = _found(album, sent.get("among"), sent.get("missing"))
        old = {entry.name: entry.caption for entry in wanted if albums.readonly(entry) is None}
        new = wording.changed(old, sent.get("kind"), sent)
        if sent.get("apply"):
            albums.write_captions(album, new, {})
    return {"changed": len(new), "new": new, "old": {name: old[name] for name in new}}


def focus(studio: "Studio", sent: Sent) -> Any:
    with studio.lock:
        albums.write_focus(_album(studio, sent), str(sent.get("name")), sent.get("focus"))
    return {}


def thumbnail(studio: "Studio", sent: Sent) -> Any:
    side = views.SIDES[sent.get("large") == "1"]
    return views.thumbnail(_album_file(studio, sent), side), "image/webp"


# Settings


def config(studio: "Studio", sent: Sent) -> Any:
    return settings.state(studio.workspace, checked_name(sent.get("name")))


def start(studio: "Studio", sent: Sent) -> Any:
    """A new config: from a preset for a folder, from another run, or from a config of another trainer."""
    told: list[str] = []
    if sent.get("text"):
        name = checked_name(sent.get("name"))
        told = starts.arrived(studio.workspace, sent, name)
    elif sent.get("copy"):
        name = settings.copy(studio.workspace, sent["copy"], sent.get("name"))
    else:
        name = checked_name(sent.get("name"))
        tree, notes, _ = starts.begun(studio.workspace, sent, name)
        settings.create(studio.workspace, name, tree, notes)
    return {**settings.state(studio.workspace, name), "told": told}


def preview(studio: "Studio", sent: Sent) -> Any:
    """The values that a preset would set."""
    tree, notes, command = starts.begun(studio.workspace, sent, checked_name(sent.get("name")))
    return {"values": settings.changes({}, tree), "notes": notes, "command": command}


def write_config(studio: "Studio", sent: Sent) -> Any:
    """Save a config's text, or give some of its options values: {"changes": {option: value}}."""
    name, changes = checked_name(sent.get("name")), sent.get("changes")
    with studio.lock:
        if "toml" in sent:
            settings.write(studio.workspace, name, str(sent["toml"]))
        elif isinstance(changes, dict):
            settings.set_values(studio.workspace, name, changes)
        else:
            raise UserError("no change is given", "settings", "send the text, or values by their options")
    return settings.state(studio.workspace, name)


def advised(studio: "Studio", sent: Sent) -> Any:
    """The changes of a run's config that a message's fix names and that would mend it."""
    path = settings.source(studio.workspace, checked_name(sent.get("name")))
    tree = settings.parsed(settings.read(path), "")[0] if path.is_file() else {}
    return remedies.offered(tree, str(sent.get("what")), str(sent.get("fix")))


# Commands


def check(studio: "Studio", sent: Sent) -> Any:
    name = checked_name(sent.get("name"))
    path = settings.source(studio.workspace, name)
    settings.read(path)
    return _queued(studio, "check", name, ["check", studio.workspace.shown(path), "--report"])


def checked(studio: "Studio", sent: Sent) -> Any:
    """What `sdxl check --report` has written, to be shown in the page; nothing if it got nowhere."""
    path = studio.workspace.run(sent.get("name")) / "check.html"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {"html": main_of(text), "written": live.stamp(path) / 1e9}


def train(studio: "Studio", sent: Sent) -> Any:
    """Queue a training, unless its config or what the last check found would stop it."""
    name = checked_name(sent.get("name"))
    problem = settings.state(studio.workspace, name)["problem"]
    if problem is None:
        stops = live.standing(studio.workspace, name, live.told(studio.workspace, studio.jobs)).get("problem")
        problem = {**stops, "fix": f"{stops['fix']}; then check again"} if stops else None
    if problem:
        raise UserError(**problem)
    return _queued(studio, "train", name, ["train", studio.workspace.shown(settings.source(studio.workspace, name))])


def stop(studio: "Studio", sent: Sent) -> Any:
    return jobs.as_json(studio.jobs.stop(sent.get("job"), bool(sent.get("at_once"))))


def now(studio: "Studio", sent: Sent) -> Any:
    """Ask a run that goes on to save or to sample, as `sdxl now` does."""
    folder, what = studio.workspace.run(sent.get("run")), str(sent.get("what"))[:20]
    said = wishes.ask(folder, [what])
    return {"said": said[0], "command": shlex.join(["sdxl", "now", studio.workspace.shown(folder), what])}


def move(studio: "Studio", sent: Sent) -> Any:
    studio.jobs.move(sent.get("job"), -1 if sent.get("up") else 1)
    return {}


def output(studio: "Studio", sent: Sent) -> Any:
    job = studio.jobs.get(sent.get("job"))
    text = studio.jobs.output(job)
    return {**jobs.as_json(job), "output": text, "problem": live.problem(text) if job.state == "failed" else None}


def helpful(studio: "Studio", sent: Sent) -> Any:
    return {"text": live.helpful(studio.workspace, studio.jobs, studio.jobs.get(sent.get("job")))}


def sample(studio: "Studio", sent: Sent) -> Any:
    arguments, out = trial.sample(studio.workspace, sent)
    return {**_queued(studio, "sample", str(sent.get("run")), arguments), "try": out.name}


def export(studio: "Studio", sent: Sent) -> Any:
    arguments = trial.export(studio.workspace, sent.get("run"), sent.get("kind"))
    return _queued(studio, "export", str(sent.get("run")), arguments)


def hub(studio: "Studio", sent: Sent) -> Any:
    """What `sdxl push` would do with a run's result, and the command. Nobody is asked, nothing is sent."""
    name, private = _repository(sent)
    plan = publish.planned(studio.workspace.run(sent.get("run")), name, private)
    command = shlex.join(["sdxl", *trial.push(studio.workspace, sent.get("run"), name, private)])
    return {"told": plan.told(), "token": plan.token, "command": command}


def push(studio: "Studio", sent: Sent) -> Any:
    return _queued(
        studio, "push", str(sent.get("run")), trial.push(studio.workspace, sent.get("run"), *_repository(sent))
    )


def _repository(sent: Sent) -> tuple[str | None, bool]:
    return str(sent.get("id") or "").strip() or None, sent.get("private") not in {None, False, "", "false"}


# Runs


def run(studio: "Studio", sent: Sent) -> Any:
    return live.page(studio.workspace, sent.get("name"))


def drawn(studio: "Studio", sent: Sent) -> Any:
    """How a picture of a run was drawn, which is named by what is said of it, and how to do it again."""
    folder, told = studio.workspace.run(sent.get("run")), sent.get("told")
    for sample in records.read(folder).samples:
        if drawings.spoken(sample.step, (sample.prompt, sample.seed, sample.weights)) == told:
            file = sample.file.relative_to(folder.resolve())
            notes = live.notes(folder / "samples")
            note = next(n for n in notes if (folder / "samples" / n["file"]).resolve() == sample.file)
            again = ["sdxl", "sample", "--like", studio.workspace.shown(folder / file), "--out", "again"]
            return {"file": file.as_posix(), "settings": note, "command": shlex.join(again)}
    raise UserError("there is no such picture", folder.name, "look at the run again")


def compare(studio: "Studio", sent: Sent) -> Any:
    """Several runs side by side, as `sdxl report RUN RUN` shows them."""
    names = [checked_name(name) for name in str(sent.get("names") or "").split(",")]
    found = [records.read(studio.workspace.run(name)) for name in names[: comparison.MOST]]
    text = comparison.page(found, comparison.names(found), datetime.now().astimezone())
    folders = [studio.workspace.shown(run.folder) for run in found]
    return {"html": main_of(text), "command": shlex.join(["sdxl", "report", *folders])}


def main_of(page: str) -> str:
    """What a page of the report holds, without its frame."""
    return page.partition("<main>")[2].rpartition("</main>")[0]


def tried(studio: "Studio", sent: Sent) -> Any:
    """What the pictures of a trial are, from the notes beside them."""
    folder = studio.workspace.state / "tries" / checked_name(sent.get("try"))
    return {"pictures": live.notes(folder)}


def run_file(studio: "Studio", sent: Sent) -> Any:
    path = inside(studio.workspace.run(sent.get("run")), sent.get("file"))
    if path.suffix not in OUTPUT:
        raise UserError("this file is not shown", path.name, "open the run's folder")
    return path


def tried_file(studio: "Studio", sent: Sent) -> Any:
    path = inside(studio.workspace.state / "tries" / checked_name(sent.get("try")), sent.get("file"))
    if path.suffix != ".png":
        raise UserError("this file is not shown", path.name, "choose a picture")
    return path


def bundle(studio: "Studio", sent: Sent) -> Any:
    return trial.bundle(studio.workspace, sent.get("run"))


def _queued(studio: "Studio", kind: str, name: str, arguments: list[str]) -> dict[str, Any]:
    return jobs.as_json(studio.jobs.add(kind, name, arguments))


def _album(studio: "Studio", sent: Sent) -> albums.Album:
    return albums.open_album(studio.workspace.opened(sent.get("folder")))


def _album_file(studio: "Studio", sent: Sent) -> Path:
    """A picture of a chosen folder, without reading the whole folder for each of its thumbnails."""
    path = inside(studio.workspace.opened(sent.get("folder")), sent.get("name"))
    if path.suffix.lower() not in PICTURES:
        raise UserError("this is no picture", path.name, "choose one that is listed")
    return path


def _tree(studio: "Studio", sent: Sent) -> dict[str, Any] | None:
    """The options of the run that is named, if it is one on this folder: its sizes are meant."""
    path = settings.source(studio.workspace, sent["run"]) if sent.get("run") else None
    values = settings.state(studio.workspace, str(sent["run"]))["values"] if path and path.is_file() else None
    own = values and (studio.workspace.folder / Path(values["data"][0]["path"]).expanduser()).resolve()
    return values if own == studio.workspace.opened(sent.get("folder")) else None


def _whole(value: object, default: int) -> int:
    text = str(value if value is not None else default)
    return int(text) if text.isdigit() and len(text) < 10 else default


Action = Callable[["Studio", Sent], Any]
ACTIONS: dict[tuple[str, str], Action] = {
    ("GET", "/api/begin"): begin,
    ("GET", "/api/watched"): watched,
    ("GET", "/api/browse"): browse,
    ("POST", "/api/choose"): choose,
    ("GET", "/api/pictures"): pictures,
    ("GET", "/api/verdict"): verdict,
    ("GET", "/api/crops"): crops,
    ("POST", "/api/caption"): caption,
    ("POST", "/api/change"): change,
    ("POST", "/api/focus"): focus,
    ("GET", "/api/config"): config,
    ("POST", "/api/preview"): preview,
    ("POST", "/api/start"): start,
    ("POST", "/api/config"): write_config,
    ("GET", "/api/advised"): advised,
    ("POST", "/api/check"): check,
    ("GET", "/api/checked"): checked,
    ("POST", "/api/train"): train,
    ("POST", "/api/stop"): stop,
    ("POST", "/api/now"): now,
    ("POST", "/api/move"): move,
    ("GET", "/api/output"): output,
    ("GET", "/api/helpful"): helpful,
    ("POST", "/api/sample"): sample,
    ("POST", "/api/export"): export,
    ("GET", "/api/hub"): hub,
    ("POST", "/api/push"): push,
    ("GET", "/api/run"): run,
    ("GET", "/api/drawn"): drawn,
    ("GET", "/api/compare"): compare,
    ("GET", "/api/tried"): tried,
}
FILES: dict[str, Action] = {
    "/api/thumbnail": thumbnail,
    "/api/run-file": run_file,
    "/api/tried-file": tried_file,
    "/api/bundle": bundle,
}
