"""What the page can do, through the server: captions, crops, settings, jobs; and that hostile text stays text."""

import io
import json
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trainer import configfile
from sdxl_trainer.config import Config
from sdxl_trainer.data import geometry
from sdxl_trainer.studio import album, jobs, live, settings, views, wording
from sdxl_trainer.studio.workspace import Workspace

HOSTILE = '<script>alert("1")</script> \'"><img src=x onerror=alert(2)> & a cat \u202e'


def listed(client: TestClient, folder: str, **given: Any) -> list[dict[str, Any]]:
    return client.get("/api/pictures", params={"folder": folder, **given}).json()["pictures"]


def save(client: TestClient, folder: str, captions: dict[str, Any], before: dict[str, str] | None = None) -> Any:
    return client.post("/api/caption", json={"folder": folder, "captions": captions, "before": before or {}})


def test_captions_are_read_and_written_in_the_files_that_training_reads(client: TestClient, opened: str) -> None:
    assert [(p["name"], p["caption"]) for p in listed(client, opened)] == [
        ("img0.png", "a boat, tag0"),
        ("img1.png", "a boat, tag1"),
        ("img2.png", "a boat, tag2"),
        ("img3.png", ""),
    ]
    assert save(client, opened, {"img3.png": " new words "}, {"img3.png": ""}).status_code == 200
    assert (Path(opened) / "img3.txt").read_text(encoding="utf-8") == "new words\n"
    assert [p["name"] for p in listed(client, opened, missing=1)] == []
    assert [p["name"] for p in listed(client, opened, find="TAG1")] == ["img1.png"]


def test_a_caption_that_another_program_changed_is_not_overwritten(client: TestClient, opened: str) -> None:
    (Path(opened) / "img0.txt").write_text("changed elsewhere", encoding="utf-8")
    answer = save(client, opened, {"img0.png": "mine", "img1.png": "mine"}, {"img0.png": "a boat, tag0"})
    assert answer.status_code == 400
    assert (Path(opened) / "img0.txt").read_text(encoding="utf-8") == "changed elsewhere"
    assert (Path(opened) / "img1.txt").read_text(encoding="utf-8") == "a boat, tag1\n"


def test_a_caption_file_that_is_not_utf_8_is_not_lost(client: TestClient, opened: str) -> None:
    (Path(opened) / "img0.txt").write_bytes("红色的猫".encode("gbk"))
    assert [p["readonly"] for p in listed(client, opened)] == ["img0.txt is not UTF-8 text", None, None, None]
    assert save(client, opened, {"img0.png": "x"}).status_code == 400
    assert client.post("/api/focus", json={"folder": opened, "name": "img1.png", "focus": [0, 0]}).status_code == 400
    assert (Path(opened) / "img0.txt").read_bytes() == "红色的猫".encode("gbk")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_keeps_its_other_columns(client: TestClient, opened: str, name: str) -> None:
    rows = [{"file_name": f"img{i}.png", "text": f"picture {i}, wide", "artist": "someone, else"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith("csv"):
        text = "file_name,text,artist\n" + "".join(
            f'img{i}.png,"picture {i}, wide","someone, else"\n' for i in range(3)
        )
    (Path(opened) / name).write_text(text, encoding="utf-8")
    assert save(client, opened, {"img1.png": 'a "quoted", one', "img3.png": "added"}).status_code == 200
    found = {p["name"]: p["caption"] for p in listed(client, opened)}
    assert found == {
        "img0.png": "picture 0, wide",
        "img1.png": 'a "quoted", one',
        "img2.png": "picture 2, wide",
        "img3.png": "added",
    }
    read = album.metadata.READERS[Path(name).suffix](Path(opened) / name)
    assert [row["artist"] for _, row in read[:3]] == ["someone, else"] * 3


def test_a_focus_is_read_by_training_and_moves_the_crop(client: TestClient, opened: str) -> None:
    before = client.get("/api/crops", params={"folder": opened, "name": "img0.png"}).json()
    assert before["focus"] is None
    client.post("/api/focus", json={"folder": opened, "name": "img0.png", "focus": [0.9, 0.5]})
    captions = [p["caption"] for p in listed(client, opened)]
    assert captions == ["a boat, tag0", "a boat, tag1", "a boat, tag2", ""]
    data = configfile.Config.model_fields["data"].annotation.__args__[0](
        path=opened, resolution=64, focus="column", caption="none", buckets="none"
    )
    (record,) = [r for r in views.folders.records(data, album.open_album(Path(opened)).tree, "train", "x") if r.focus]
    assert (record.name, record.focus) == ("img0.png", (0.9, 0.5))
    made = views.crops(album.open_album(Path(opened)), "img0.png", data)
    (expected,) = geometry.variants(data, (256, 384), 0, "img0.png", focus=(0.9, 0.5))
    assert made["crops"][0]["box"] == [expected.crop[1] / 96, 0.0, 64 / 96, 1.0]
    assert made["crops"][0]["box"][0] == pytest.approx(1 / 3)
    assert made["lost"] == pytest.approx(1 / 3)
    assert client.post("/api/focus", json={"folder": opened, "name": "img0.png", "focus": [2, 0]}).status_code == 400


def test_changes_to_all_captions() -> None:
    captions = {"a": "a boat, red", "b": "sks boat", "c": ""}
    assert wording.changed(captions, "prefix", {"words": "sks"}) == {"a": "sks, a boat, red", "c": "sks"}
    assert wording.changed(captions, "suffix", {"words": "red"}) == {"b": "sks boat, red", "c": "red"}
    assert wording.changed(captions, "replace", {"find": "boat", "by": "ship"}) == {"a": "a ship, red", "b": "sks ship"}
    assert wording.changed(captions, "remove", {"words": "RED"}) == {"a": "a boat"}
    assert wording.frequent(["a, b, a", "b, c", "b"])[0] == ("b", 3)


def test_a_change_is_shown_before_it_is_made_and_can_be_taken_back(client: TestClient, opened: str) -> None:
    sent = {"folder": opened, "kind": "replace", "find": "boat", "by": "ship"}
    shown = client.post("/api/change", json=sent).json()
    assert shown["changed"] == 3
    assert listed(client, opened)[0]["caption"] == "a boat, tag0"
    made = client.post("/api/change", json={**sent, "apply": True}).json()
    assert listed(client, opened)[0]["caption"] == "a ship, tag0"
    assert save(client, opened, made["old"], made["new"]).status_code == 200
    assert listed(client, opened)[0]["caption"] == "a boat, tag0"
    assert client.post("/api/change", json={"folder": opened, "kind": "nonsense"}).status_code == 400


def test_the_verdict_says_what_training_would_refuse(client: TestClient, opened: str) -> None:
    found = client.get("/api/verdict", params={"folder": opened}).json()
    assert (found["pictures"], found["captions"]) == (4, 3)
    assert "1 picture has no caption: img3.png" in found["problems"][0]["what"]
    (Path(opened) / "img3.txt").write_text("words", encoding="utf-8")
    (Path(opened) / "img1.png").write_bytes(b"<!DOCTYPE html>")
    found = client.get("/api/verdict", params={"folder": opened}).json()
    assert ["img1.png" in p["where"] for p in found["problems"]] == [True]
    assert sum(size["pictures"] for size in found["sizes"]) == 3


def test_hostile_text_is_kept_as_text(client: TestClient, opened: str) -> None:
    long = "x" * 1_000_000
    assert save(client, opened, {"img0.png": HOSTILE}).status_code == 200
    assert listed(client, opened)[0]["caption"] == HOSTILE
    for bad in (long, 5, None, ["a"]):
        assert save(client, opened, {"img0.png": bad}).status_code == 400
    half = json.dumps({"folder": opened, "captions": {"img0.png": "\ud800"}, "before": {}})  # half a character
    assert client.post("/api/caption", content=half).status_code == 400
    assert save(client, opened, {HOSTILE: "x"}).status_code == 400
    (Path(opened) / "img1.txt").write_text(long, encoding="utf-8")
    assert max(len(p["caption"]) for p in listed(client, opened)) == album.LONGEST
    assert save(client, opened, {"img1.png": "short"}).status_code == 400, "what is shown in part is not changed"
    assert (Path(opened) / "img1.txt").stat().st_size == len(long)
    for prompt in (long, "", "\n \n"):
        assert client.post("/api/sample", json={"run": "none", "prompt": prompt, "at": "base"}).status_code == 400


def test_prompts_cannot_become_options_of_the_command(tmp_path: Path) -> None:
    from sdxl_trainer.studio import trial

    (tmp_path / "runs").mkdir()
    workspace = Workspace(tmp_path)
    settings.create(workspace, "a", {"model": {"path": "base"}, "data": [{"path": "p"}], "train": {"steps": 1}})
    arguments, _ = trial.sample(workspace, {"run": "a", "at": "base", "prompt": "--out=/etc", "negative": "--lora x"})
    assert arguments[:4] == ["sample", "base", "--prompt=--out=/etc", "--negative=--lora x"]


def test_the_form_has_every_option_of_the_config() -> None:
    found = {(f["section"], f["name"]) for f in settings.fields()}
    wanted = set()
    for name, field in Config.model_fields.items():
        section = configfile._section_class(field)
        wanted |= {(name, key) for key in section.model_fields} if section else {("", name)}
    assert found == wanted
    known = {
        ".".join(part for part in (f["section"], "0" if f["list"] else "", f["name"]) if part)
        for f in settings.fields()
    }
    assert set(settings.FIRST) <= known
    field = next(f for f in settings.fields() if f["name"] == "gradient_checkpointing")
    assert (field["kind"], field["choices"][:2], field["default"]) == ("json", ["true", "false"], False)
    field = next(f for f in settings.fields() if f["name"] == "checkpoint_every")
    assert (field["kind"], field["choices"], field["default"]) == ("steps", None, 500)


def test_a_config_is_edited_as_a_form_and_as_text(client: TestClient, opened: str, tmp_path: Path) -> None:
    sent = {"name": "one", "folder": opened, "preset": "lora-style", "micro": True, "trigger": "sks boat"}
    shown = client.post("/api/preview", json=sent).json()
    assert shown["command"].startswith(f"sdxl train {opened} --trigger 'sks boat' --preset lora-style --model ")
    assert not (tmp_path / "home" / "runs" / "one.toml").exists()
    made = client.post("/api/start", json=sent)
    assert made.status_code == 200, made.text
    state = made.json()
    path = tmp_path / "home" / "runs" / "one.toml"
    assert configfile.load(path).data[0].path == opened
    assert state["problem"] is None
    assert state["changes"] == []

    def change(**sent: Any) -> Any:
        return client.post("/api/config", json={"name": "one", **sent})

    state = change(changes={"train.batch_size": 3}).json()
    assert tomllib.loads(path.read_text(encoding="utf-8"))["train"]["batch_size"] == 3
    assert [c["key"] for c in state["changes"]] == ["train.batch_size"]
    assert change(changes={"train.batch_size": "many"}).json()["problem"]["what"].startswith("train.batch_size")
    assert client.post("/api/train", json={"name": "one"}).status_code == 400, "what would be refused is not started"
    assert change(changes={"train.batch_size": None}).json()["problem"] is None
    assert change(changes={"nonsense.x": 1}).status_code == 400
    assert change(toml="[train\n").status_code == 400
    assert "batch_size" not in tomllib.loads(path.read_text(encoding="utf-8"))["train"]
    text = path.read_text(encoding="utf-8").replace("[train]", "[train]\nbatch_size = 2")
    assert change(toml=text).json()["tree"]["train"]["batch_size"] == 2
    assert client.post("/api/start", json={**sent, "trigger": "other"}).status_code == 400
    assert client.post("/api/start", json={"name": "two", "copy": "one"}).json()["tree"]["train"]["batch_size"] == 2


def test_commands_wait_for_one_another_in_their_lane(tmp_path: Path) -> None:
    queue = jobs.Jobs(tmp_path / "jobs", tmp_path)
    first = queue.add("train", "a", ["schema"])
    second, third = queue.add("train", "b", ["schema"]), queue.add("train", "c", ["schema"])
    beside = queue.add("check", "a", ["schema"])
    assert [queue.get(j.id).state for j in (first, second, third, beside)] == ["running", "queued", "queued", "running"]
    with pytest.raises(jobs.UserError):
        queue.add("train", "b", ["schema"])
    queue.move(third.id, -1)
    assert [job.name for job in queue.waiting("training")] == ["c", "b"]
    assert queue.stop(second.id).state == "stopped"
    ended(queue, first, third, beside)
    assert [queue.get(j.id).state for j in (first, third, beside)] == ["done"] * 3
    assert json.loads(queue.output(beside, 10_000_000))["title"] == "Config"


def test_a_command_outlives_the_studio_and_is_found_again(tmp_path: Path) -> None:
    queue = jobs.Jobs(tmp_path / "jobs", tmp_path)
    job = queue.add("check", "a", ["ui", "--no-open", "--port", "0", str(tmp_path)])
    again = jobs.Jobs(tmp_path / "jobs", tmp_path)
    assert again.get(job.id).state == "running"
    assert jobs.memory(again.get(job.id)) > 0
    again.stop(job.id, at_once=True)
    ended(queue, job)
    again.tick()
    assert again.get(job.id).state == "lost"
    assert queue.get(job.id).state == "stopped"


def test_how_a_command_ended_is_told_by_its_last_words(tmp_path: Path) -> None:
    queue = jobs.Jobs(tmp_path / "jobs", tmp_path)
    failed = queue.add("train", "a", ["train", "missing.toml"])
    ended(queue, failed)
    assert (queue.get(failed.id).state, queue.get(failed.id).code) == ("failed", 2)
    output = queue.output(failed)
    assert live.problem(output) == {
        "what": "there is no config file 'missing.toml'",
        "where": ".",
        "fix": "give the path of a TOML file",
    }
    assert jobs._told(output) == "failed"
    assert jobs._told("steps 4/4\ndone: the result is in runs/a, the report in runs/a/report.html\n") == "done"
    assert jobs._told("interrupted; the same command continues\n") == "stopped"


def ended(queue: jobs.Jobs, *wanted: jobs.Job) -> None:
    for _ in range(600):
        queue.tick()
        if all(queue.get(job.id).state in jobs.ENDED for job in wanted):
            return
        jobs.time.sleep(0.1)
    raise AssertionError([queue.get(job.id) for job in wanted])


def test_a_whole_job(client: TestClient, opened: str, wait: Callable[..., Any], tmp_path: Path) -> None:
    """Settings, check, training stopped and continued, pictures by a checkpoint, one file for other programs."""
    save(client, opened, {"img3.png": "a red circle"})
    start = {"name": "job", "folder": opened, "preset": "lora-style", "micro": True}
    assert client.post("/api/start", json=start).json()["problem"] is None
    changes = {
        "train.steps": 4,
        "train.epochs": None,
        "train.batch_size": 2,
        "train.checkpoint_every": 2,
        "data.0.resolution": 64,
        "validation.prompts": ["a red circle"],
        "validation.images": 1,
        "validation.steps": 2,
    }
    assert client.post("/api/config", json={"name": "job", "changes": changes}).json()["problem"] is None
    check = wait(client, client.post("/api/check", json={"name": "job"}).json())
    assert check["state"] == "done", check["output"]
    assert "img3.png" in client.get("/api/checked", params={"name": "job"}).json()["html"]
    trained = wait(client, client.post("/api/train", json={"name": "job"}).json())
    assert trained["state"] == "done", trained["output"]
    assert trained["command"] == "sdxl train runs/job.toml"
    found = client.get("/api/run", params={"name": "job"}).json()
    assert found["checkpoints"] == [2, 4]
    assert found["result"] is True
    assert "figure" in found["html"]["curves"]
    assert "data:image/jpeg" in found["html"]["pictures"]
    (run,) = [r for r in client.get("/api/watched").json()["runs"] if r["name"] == "job"]
    assert (run["state"], run["step"], run["steps"]) == ("done", 4, 4)
    late = client.post("/api/now", json={"run": "job", "what": "save"})
    assert (late.status_code, late.json()["what"]) == (400, "no run is at work in this folder")
    asked = {"run": "job", "at": 2, "prompt": HOSTILE, "steps": 2, "images": 1, "seed": 5}
    drawing = client.post("/api/sample", json=asked).json()
    drawn = wait(client, drawing)
    assert drawn["state"] == "done", drawn["output"]
    (picture,) = client.get("/api/tried", params={"try": drawing["try"]}).json()["pictures"]
    assert (picture["prompt"], picture["seed"]) == (HOSTILE, 5)
    file = client.get("/api/tried-file", params={"try": drawing["try"], "file": picture["file"]})
    assert file.headers["content-type"] == "image/png"
    exported = wait(client, client.post("/api/export", json={"run": "job", "kind": "kohya"}).json())
    assert exported["state"] == "done", exported["output"]
    assert (tmp_path / "home" / "runs" / "job" / "job.safetensors").is_file()
    shared = client.get("/api/bundle", params={"run": "job"}).content
    with zipfile.ZipFile(io.BytesIO(shared)) as archive:
        assert {"job/report.html", "job/README.md", "job/job.safetensors"} <= set(archive.namelist())
        assert "job/check.html" not in archive.namelist(), "the trained pictures stay here"
    assert client.post("/api/start", json={"name": "again", "copy": "job"}).status_code == 200


def test_what_is_shown_to_helpers_says_nothing_private(client: TestClient, opened: str, tmp_path: Path) -> None:
    sent = {"name": "one", "folder": opened, "preset": "lora-style", "micro": True, "trigger": "secretword"}
    assert client.post("/api/start", json=sent).status_code == 200
    client.post("/api/config", json={"name": "one", "changes": {"validation.prompts": ["secret prompt"]}})
    job = client.app.state.studio.jobs.add("train", "one", ["train", str(tmp_path / "home" / "missing.toml")])  # type: ignore[attr-defined]
    ended(client.app.state.studio.jobs, job)  # type: ignore[attr-defined]
    text = client.get("/api/helpful", params={"job": job.id}).json()["text"]
    assert "train.learning_rate = " in text
    assert "torch 2" in text
    assert "there is no config file" in text
    assert not [word for word in ("secret", str(tmp_path), "photos") if word in text]


def test_problems_of_one_kind_are_told_once() -> None:
    many = [views.UserError(f"{n} x {n} pixels is too small", f"{n}.png", "use a larger picture") for n in range(20)]
    (one, other) = views.together([*many, views.UserError("the picture is damaged", "x.png", "replace it")])
    assert one["what"] == "20 pictures, for example: 0 x 0 pixels is too small"
    assert one["where"].endswith("7.png and 12 more")
    assert other == {"what": "the picture is damaged", "where": "x.png", "fix": "replace it"}


def test_runs_are_compared_as_the_report_compares_them(client: TestClient, tmp_path: Path) -> None:
    from tests.fake_runs import fake_run

    for name in ("one", "two"):
        fake_run(tmp_path / "home" / "runs" / name, steps=100, ema=False)
    found = client.get("/api/compare", params={"names": "one,two"}).json()
    assert found["command"] == "sdxl report runs/one runs/two"
    assert "2 runs compared" in found["html"]
    assert "<script>alert" not in found["html"]
    for names in ("one", "one,one", "one,../two", "one,missing", ""):
        answer = client.get("/api/compare", params={"names": names})
        assert answer.status_code == (200 if names == "one" else 400)


def test_what_the_command_refuses(tmp_path: Path) -> None:
    import socket

    from sdxl_trainer import studio

    with socket.socket() as other:
        other.bind((studio.HOST, 0))
        other.listen()
        with pytest.raises(jobs.UserError, match=f"port {other.getsockname()[1]}"):
            studio.serve(tmp_path, other.getsockname()[1], show=False)
    with pytest.raises(jobs.UserError, match="there is no folder"):
        studio.serve(tmp_path / "missing", 0, show=False)
