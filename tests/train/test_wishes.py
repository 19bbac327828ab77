"""What a run is asked for while it goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import checkpoint, files, lock, train, wishes
from sdxl_trainer.errors import Interrupted, UserError

VALIDATION = {"prompts": ["a red circle"], "images": 1, "steps": 2}


def test_a_run_saves_and_samples_when_it_is_asked_and_learns_the_same(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str) -> Path:
        options = {"steps": 4, "checkpoint_every": 0}
        return train.train(config(output_dir=str(tmp_path / name), train=options, validation=VALIDATION))

    alone, original = run("alone"), train.train_step
    asked = tmp_path / "asked"

    def step(made: Any, state: Any, *more: Any) -> Any:
        if state.step == 2:
            said = wishes.ask(asked, ["save", "sample"])
            assert said[0] == "a checkpoint is saved after the step that is running"
        return original(made, state, *more)

    asked.mkdir()
    (asked / wishes.WISHES["save"]).touch()  # of a run that ended before it saw it
    monkeypatch.setattr(train, "train_step", step)
    assert run("asked") == asked
    assert [p.name for p in asked.glob("checkpoint-*")] == ["checkpoint-3"]
    checkpoint.verify(checkpoint.Checkpoint(asked / "checkpoint-3", 3))
    shown = sorted(p.parent.name for p in asked.glob("samples/*/*.png"))
    assert shown == ["step-000003", "step-000004"]
    assert not [p.name for p in asked.iterdir() if p.name in wishes.WISHES.values()]
    assert "step 3: asked to sample and save now" in capsys.readouterr().err
    assert files.tree_hashes(alone / "unet") == files.tree_hashes(asked / "unet")


def test_a_paused_run_is_saved_draws_and_goes_on_to_the_same_end(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {name: tmp_path / name for name in ("alone", "paused", "stopped")}
    seen: list[int] = []

    def run(name: str) -> Path:
        return train.train(
            config(output_dir=str(folders[name]), train={"steps": 4, "checkpoint_every": 0}, validation=VALIDATION)
        )

    alone, original = run("alone"), train.train_step

    def pausing(name: str, rest: Callable[[float], None]) -> None:
        def step(made: Any, state: Any, *more: Any) -> Any:
            if state.step == 1:
                said = wishes.ask(folders[name], ["pause"])
                assert said == ["the run saves a checkpoint and holds after the step that is running"]
            return original(made, state, *more)

        monkeypatch.setattr(train, "train_step", step)
        monkeypatch.setattr(train, "sleep", rest)

    def rest(seconds: float) -> None:
        folder = folders["paused"]
        seen.append(len((folder / "metrics.jsonl").read_text().splitlines()))
        checkpoint.verify(checkpoint.Checkpoint(folder / "checkpoint-2", 2))
        if len(seen) == 1:
            with pytest.raises(UserError, match="pause, which saves its last step"):
                wishes.ask(folder, ["save"])
            assert wishes.ask(folder, ["sample"]) == ["the validation pictures are drawn while the run is paused"]
        else:
            assert (folder / "samples/step-000002/0-0.png").is_file()
            assert wishes.ask(folder, ["continue"]) == ["the run goes on"]

    pausing("paused", rest)
    assert files.tree_hashes(run("paused") / "unet") == files.tree_hashes(alone / "unet")
    assert seen == [2, 2]
    assert "paused after step 2, which is saved; 'sdxl now" in capsys.readouterr().err
    assert json.loads((folders["paused"] / "manifest.json").read_text())["timings"].keys() >= {"paused"}

    pausing("stopped", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run("stopped")
    assert [p.name for p in folders["stopped"].glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folders["stopped"] / wishes.WISHES["pause"]).exists()
    monkeypatch.setattr(train, "train_step", original)
    assert files.tree_hashes(run("stopped") / "unet") == files.tree_hashes(alone / "unet")


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    def asking(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sdxl_trainer", "now", str(tmp_path), *names]
        return subprocess.run(command, capture_output=True, text=True)

    refused = asking("save")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: no run is at work in this folder")
    with lock.held(tmp_path):
        (tmp_path / "config.toml").write_text("[train]\nsteps = 4\n")
        with pytest.raises(UserError, match="did you mean 'sample'"):
            wishes.ask(tmp_path, ["samples"])
        with pytest.raises(UserError, match="this run has no validation"):
            wishes.ask(tmp_path, ["save", "sample"])
        assert wishes.granted(tmp_path) == set(), "all of it or nothing"
        done = asking("save")
        assert (done.returncode, done.stderr) == (0, "")
        assert wishes.granted(tmp_path) == {"save"}
        with pytest.raises(UserError, match="is not paused"):
            wishes.ask(tmp_path, ["continue"])
        wishes.ask(tmp_path, ["pause"])
        with pytest.raises(UserError, match="goes with no other"):
            wishes.ask(tmp_path, ["continue", "save"])
        assert wishes.granted(tmp_path) == wishes.granted(tmp_path) == {"pause"}, "it stays until it is taken back"
        wishes.forget(tmp_path)
        assert wishes.granted(tmp_path) == set()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = {"pid": process.pid, "host": socket.gethostname()}
    (tmp_path / lock.NAME).write_text(json.dumps(gone), encoding="utf-8")
    with pytest.raises(UserError, match="no run is at work"):
        wishes.ask(tmp_path, ["save"])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as another:
        # The number of a run that was killed is another process's now.
        for began, there in (("1", not Path("/proc/self/stat").exists()), (None, True)):
            told = {**gone, "pid": another.pid, "began": began}
            (tmp_path / lock.NAME).write_text(json.dumps(told), encoding="utf-8")
            assert lock.is_held(tmp_path) == there
        another.communicate(b"\n")
    (tmp_path / lock.NAME).write_text(json.dumps({**gone, "host": "elsewhere"}), encoding="utf-8")
    assert wishes.ask(tmp_path, ["save"])
    assert (tmp_path / wishes.WISHES["save"]).is_file()
