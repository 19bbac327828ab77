"""What stands between a config and its start, and beside its end: fixes as buttons, the check, the hub."""

import json
import os
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trainer import configfile, guards, publish, wishes
from sdxl_trainer.errors import UserError
from sdxl_trainer.studio import live, remedies, settings
from sdxl_trainer.studio.workspace import Workspace
from tests.bad_inputs import caption_rows, config_rows, place
from tests.bad_inputs.place import Bad
from tests.fake_runs import fake_run

Tree = dict[str, Any]


def tree(**sections: Any) -> Tree:
    made: Tree = {"output_dir": "runs/a", "model": {"path": "base"}, "data": [{"path": "p"}], "train": {"steps": 4}}
    for name, value in sections.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    return made


def refusal(made: Tree) -> UserError | None:
    try:
        configfile.validated(made, "a.toml")
    except UserError as error:
        return error
    return None


def fixes(made: Tree) -> list[dict[str, Any]]:
    found = refusal(made)
    assert found
    return [each["changes"] for each in remedies.offered(made, found.what, found.fix)]


MENDED: list[tuple[Tree, list[dict[str, Any]]]] = [
    (tree(train={"learning_rat": 0.1}), [{"train.learning_rat": None, "train.learning_rate": 0.1}]),
    (tree(sed=3), [{"sed": None, "seed": 3}]),
    (tree(optimizer={"name": "adamv"}), [{"optimizer.name": "adamw"}]),
    (tree(data=[{"path": "p", "resolution": 100}]), [{"data.0.resolution": 96}, {"data.0.resolution": 104}]),
    (tree(train={"epochs": 2}), [{"train.epochs": None}, {"train.steps": None}]),
    (tree(train={"batch_size": 2, "micro_batch": 3}), [{"train.micro_batch": 2}]),
    (tree(timesteps={"multiplier": 2.0}), [{"timesteps.multiplier": None}]),
    (tree(objective={"weighting": "min_snr"}), [{"objective.snr_gamma": 5.0}]),
    (tree(optimizer={"name": "adamw_bf16"}), [{"train.weights": "bf16"}, {"optimizer.name": "adamw"}]),
    (
        tree(optimizer={"name": "schedulefree"}, schedule={"name": "cosine"}),
        [{"schedule.name": "constant"}, {"schedule.name": "constant_with_warmup"}],
    ),
    (tree(objective={"prediction": "epsilon", "zero_terminal_snr": True}), [{"objective.prediction": "v_prediction"}]),
]


@pytest.mark.parametrize(("made", "changes"), MENDED, ids=lambda value: str(value)[:40])
def test_a_message_s_fix_becomes_changes_that_mend_it(made: Tree, changes: list[dict[str, Any]]) -> None:
    assert fixes(made) == changes
    for change in changes:
        mended = json.loads(json.dumps(made))
        for key, value in change.items():
            configfile.put(mended, key, value)
        assert configfile.validated(mended, "a.toml")


@pytest.mark.parametrize("bad", [*config_rows.ROWS, *caption_rows.ROWS], ids=lambda bad: bad.name)
def test_what_is_offered_for_any_bad_config_mends_it(bad: Bad) -> None:
    """Every bad input that is a value: each button leads to a config that is allowed, or on to the next problem."""
    made = place.tree()
    for key, value in bad.options.items():
        configfile.put(made, key, value)
    found = refusal(made)
    for each in remedies.offered(made, found.what, found.fix) if found else []:
        changed = json.loads(json.dumps(made))
        for key, value in each["changes"].items():
            configfile.put(changed, key, value)
        after = refusal(changed)
        assert found is None or after is None or after.what != found.what


def test_what_helps_against_too_little_memory_is_offered() -> None:
    made = tree(train={"batch_size": 4}, optimizer={"name": "adamw"})
    fix = "; ".join(guards.remedies(configfile.validated(made, ""))[:3])
    assert remedies.offered(made, "the memory is not enough", f"{fix}; the same command continues") == [
        {"words": "Set train.micro_batch = 2", "changes": {"train.micro_batch": 2}},
        {"words": "Set train.gradient_checkpointing = true", "changes": {"train.gradient_checkpointing": True}},
        {"words": "Set train.fused_backward = true", "changes": {"train.fused_backward": True}},
    ]
    assert remedies.offered(made, "x", "train.shard = true on several GPUs; buy a card; rm -rf / = true") == []


def begun(client: TestClient, opened: str) -> Path:
    """A config `one` for micro-SDXL; its file."""
    sent = {"name": "one", "folder": opened, "preset": "lora-style", "micro": True, "trigger": "sks"}
    assert client.post("/api/start", json=sent).status_code == 200
    return client.app.state.studio.workspace.config("one")  # type: ignore[attr-defined,no-any-return]


def test_a_fix_changes_its_own_line_and_keeps_comments(client: TestClient, opened: str) -> None:
    path = begun(client, opened)
    text = re.sub(r"(?m)^(batch_size|micro_batch) = .*\n", "", "# mine\n" + path.read_text(encoding="utf-8"))
    text = text.replace("[train]", "[train]  # how\nbatch_size = 2\nmicro_batch = 3  # try 2")
    assert client.post("/api/config", json={"name": "one", "toml": text}).json()["problem"] is not None
    state = client.get("/api/config", params={"name": "one"}).json()
    (fix,) = client.get("/api/advised", params={"name": "one", **state["problem"]}).json()
    assert client.post("/api/config", json={"name": "one", "changes": fix["changes"]}).json()["problem"] is None
    assert path.read_text(encoding="utf-8") == text.replace("micro_batch = 3  # try 2", "micro_batch = 2  # try 2")
    changes = {"ema.enabled": True, "seed": 7, "train.micro_batch": None, "validation.prompts": ["a", "b"]}
    assert client.post("/api/config", json={"name": "one", "changes": changes}).json()["problem"] is None
    config = configfile.load(path)
    assert (config.ema.enabled, config.seed) == (True, 7)
    assert config.validation.prompts == ("a", "b")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# mine\n")
    steps = next(line for line in text.splitlines() if line.startswith("steps = "))
    assert "each seen" in steps
    for key in ("data.x.y", "data.9.path", "seed.x", ""):
        assert client.post("/api/config", json={"name": "one", "changes": {key: 1}}).status_code == 400, key
    client.post("/api/config", json={"name": "one", "changes": {"train.steps": 7}})
    assert path.read_text(encoding="utf-8") == text.replace(steps, "steps = 7"), "why another value was chosen is gone"
    assert "micro_batch" not in path.read_text(encoding="utf-8")


def test_nothing_starts_that_the_check_would_stop(client: TestClient, opened: str, wait: Callable[..., Any]) -> None:
    path = begun(client, opened)
    studio = client.app.state.studio  # type: ignore[attr-defined]

    def standing() -> dict[str, Any]:
        return live.standing(studio.workspace, "one", live.told(studio.workspace, studio.jobs))

    assert standing() == {"state": "none"}
    (Path(opened) / "img1.png").write_bytes(b"<!DOCTYPE html>")
    job = wait(client, client.post("/api/check", json={"name": "one"}).json())
    assert job["state"] == "failed", job["output"]
    assert standing()["state"] == "stops"
    assert "img1.png" in standing()["problem"]["where"]
    (run,) = client.get("/api/watched").json()["runs"]
    assert run["check"] == standing()
    refused = client.post("/api/train", json={"name": "one"})
    assert refused.status_code == 400
    assert refused.json()["fix"].endswith("; then check again")
    os.utime(path)
    assert standing() == {"state": "old"}, "the settings have changed: nobody knows"


def test_a_run_that_holds_is_told_from_one_that_is_about_to(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    made = {"model": {"path": "base"}, "data": [{"path": "p"}], "train": {"steps": 4}}
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.toml").write_text("", encoding="utf-8")
    settings.files.write_text(workspace.config("a"), configfile.written({**made, "output_dir": "runs/a"}))
    job = {"id": "1", "kind": "train", "name": "a", "state": "running", "started": 0.0}
    states = []
    for says in (False, True):
        (workspace.run("a") / wishes.WISHES["pause"]).touch()
        states.append(live.summary(workspace, "a", [{**job, "paused": says}])["state"])
    wishes.forget(workspace.run("a"))
    states.append(live.summary(workspace, "a", [job])["state"])
    assert states == ["pausing", "paused", "running"]


def test_the_hub_is_asked_nothing_before_it_is_told_what_will_happen(
    client: TestClient, opened: str, wait: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(client, opened)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = client.app.state.studio.workspace.run("one")  # type: ignore[attr-defined]
    asked = {"run": "one", "id": "me/style", "private": "true"}
    assert client.get("/api/hub", params=asked).json()["what"] == "there is no run in this folder"
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "config.toml").write_text(configfile.dumps(configfile.load(run.with_suffix(".toml"))), encoding="utf-8")
    (run / "README.md").write_text("card", encoding="utf-8")
    (run / "checkpoint-2" / "state.json").write_text("{}", encoding="utf-8")
    found = client.get("/api/hub", params=asked).json()
    assert found["command"] == "sdxl push runs/one --id=me/style --private"
    assert found["told"] == publish.planned(run, "me/style", True).told()
    assert found["told"][2] == "what: 2 files, 0.0 MB: README.md, config.toml"
    assert found["token"] is True
    assert "hf_secret" not in json.dumps(found)
    assert client.get("/api/hub", params={"run": "one", "id": "--x"}).json()["command"].endswith("--id=--x --public")
    job = client.post("/api/push", json={"run": "one", "id": "", "private": False}).json()
    assert job["command"] == "sdxl push runs/one --public"
    ended = wait(client, job)
    assert ended["state"] == "failed"
    assert "switched off by HF_HUB_OFFLINE" in ended["problem"]["what"]
    assert "hf_secret" not in ended["output"]


def test_a_change_reaches_only_what_is_found(client: TestClient, opened: str) -> None:
    sent = {"folder": opened, "kind": "prefix", "words": "sks", "apply": True}
    assert client.post("/api/change", json={**sent, "among": "TAG1"}).json()["new"] == {"img1.png": "sks, a boat, tag1"}
    assert client.post("/api/change", json={**sent, "missing": True}).json()["new"] == {"img3.png": "sks"}


def test_a_picture_of_a_run_says_how_it_was_drawn(client: TestClient, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "home" / "runs" / "one", steps=100, ema=False)
    html = client.get("/api/run", params={"name": "one"}).json()["html"]["pictures"]
    names = [unescape(text) for text in re.findall(r'class="pick"[^>]*><img src="[^"]*" alt="([^"]*)"', html)]
    assert len(names) == len(set(names)) == 3 * 2 * 2
    for name in names:
        found = client.get("/api/drawn", params={"run": "one", "told": name}).json()
        step, seed = re.findall(r"\d+", name)[:2]
        assert (found["settings"]["step"], found["settings"]["seed"]) == (int(step), int(seed))
        assert found["settings"]["prompt"] in name
        assert found["command"] == f"sdxl sample --like runs/one/{found['file']} --out again"
        assert (run / found["file"]).is_file()
    assert client.get("/api/drawn", params={"run": "one", "told": "../x"}).status_code == 400
