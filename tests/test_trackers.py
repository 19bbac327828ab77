"""Trackers get numbers, pictures and tables; whatever they do, the run is as it would be without them."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_trainer import checkpoint, trackers
from sdxl_trainer.log import figure, read_metrics
from sdxl_trainer.train import train

VALIDATION = {"prompts": ["a red circle"], "images": 2, "steps": 1, "loss_every": 1, "trained_pictures": 2}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_numbers_pictures_and_tables(config: Callable[..., Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train(config(log={"trackers": ["tensorboard"]}, validation=VALIDATION, train={"steps": 2}))
    folder = next(p.parent for p in (output / "logs").rglob("events*") if "hparams" not in str(p.parent.name))
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Scalars("trained_loss_at/125")] == [1, 2]
    assert len(events.Images("a red circle/0" if "a red circle/0" in events.Tags()["images"] else "a red circle")) >= 1
    assert any("validation loss by timestep" in tag for tag in events.Tags()["tensors"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_works_offline(config: Callable[..., Any], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config(log={"trackers": ["wandb"]}, validation=VALIDATION, train={"steps": 2}))
    assert list(tmp_path.rglob("*.wandb"))
    assert len(list(tmp_path.rglob("media/images/*/*.png")) + list(tmp_path.rglob("media/images/*.png"))) == 2
    assert list(tmp_path.rglob("media/table/**/*.json"))


class Fake:
    """A tracker of accelerate's shape that keeps what it is given, or fails as it is told."""

    requires_logging_directory = False
    fails: tuple[str, ...] = ()
    hangs: threading.Event | None = None
    got: list[tuple[str, Any]]

    def __init__(self, run_name: str, **told: Any) -> None:
        self._do("init", run_name, told)

    def _do(self, what: str, *told: Any) -> None:
        if what in type(self).fails:
            raise ConnectionError(f"no route to {what}\nsecond line")
        hangs = type(self).hangs
        if hangs is not None and what == "log":
            hangs.wait()
        type(self).got.append((what, told))

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, options: dict[str, Any]) -> None:
        self._do("configure", options)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._do("log", values, step)

    def log_images(self, values: dict[str, Any], step: int, **more: Any) -> None:
        self._do("images", values, step)

    def log_table(self, name: str, columns: list[str], data: list[Any], step: int) -> None:
        self._do("table", name, columns, data, step)

    def finish(self) -> None:
        self._do("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Fake]]:
    """Puts a fake into the place of wandb."""
    from accelerate import tracking

    def make(**told: Any) -> type[Fake]:
        made = type("Made", (Fake,), {"got": [], **told})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", made)
        return made

    return make


def weights(output: Path) -> Any:
    return checkpoint.read_weights(output / "unet")


@pytest.mark.parametrize(
    "fails", [(), ("init",), ("start",), ("log",), ("images", "table"), ("log", "images", "table", "finish")]
)
def test_an_outage_changes_nothing_but_the_tracker(
    config: Callable[..., Any], fake: Callable[..., type[Fake]], tmp_path: Path, capsys: Any, fails: tuple[str, ...]
) -> None:
    made = fake(fails=fails)
    options = {"steps": 2, "checkpoint_every": 0}
    plain = train(config(output_dir=str(tmp_path / "plain"), train=options, validation=VALIDATION))
    capsys.readouterr()
    told = {"log": {"trackers": ["wandb"]}, "validation": VALIDATION, "train": options}
    output = train(config(output_dir=str(tmp_path / "tracked"), **told))
    one, two = weights(plain), weights(output)
    assert all(bool((one[name] == two[name]).all()) for name in one)
    assert len(read_metrics(output / "metrics.jsonl")) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the tracker wandb")]
    if not fails:
        assert said == []
        kinds = [what for what, _ in made.got]
        assert kinds[:3] == ["init", "start", "configure"]
        assert kinds[-1] == "finish"
        assert kinds.count("log") == 2
        assert kinds.count("images") == 1
        assert kinds.count("table") == 3, "before the first step, and after both"
        rows = [told[0] for what, told in made.got if what == "log"]
        assert {"loss", "learning_rate", "trained_loss", "trained_loss_at/125", "memory_gb"} <= rows[0].keys()
        assert "step" not in rows[0]
    else:
        first = said[0].removeprefix("the tracker wandb failed (ConnectionError: no route to ").split(")")[0]
        assert first in fails
        assert said[0].endswith("; the run goes on, metrics.jsonl has everything")
        assert "second line" not in said[0]
        assert "lacks" in said[-1]
        assert len(said) == 2, "told once, and what is lacking at the end"


def test_a_tracker_that_hangs_does_not_hold_the_run(fake: Callable[..., type[Fake]], tmp_path: Path) -> None:
    hangs, said = threading.Event(), list[str]()
    fake(hangs=hangs)
    made = trackers.Trackers(["wandb"], "project", tmp_path, said.append, main=True)
    made.start({})
    began = time.monotonic()
    for step in range(trackers.WAITING + 50):
        made.scalars({"loss": 0.5}, step)
    assert time.monotonic() - began < 30
    made.close(patience=0.2)
    hangs.set()
    assert len(said) == 1
    assert said[0].endswith("it does not answer")
    made.close()
    made.scalars({"loss": 1.0}, 1)


def test_a_run_is_one_in_wandb_however_often_it_is_interrupted(
    config: Callable[..., Any], fake: Callable[..., type[Fake]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found again by its id; what was sent before the interruption is not sent again."""
    for name in ("WANDB_MODE", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    made = fake()
    given = {"log": {"trackers": ["wandb"]}}
    output = train(config(**given, train={"steps": 2, "checkpoint_every": 1}))
    made.run = type("Run", (), {"step": 4})  # type: ignore[attr-defined]  # steps 0 to 3 are there already
    train(config(**given, train={"steps": 5, "checkpoint_every": 1}))
    first, second = (told for what, told in made.got if what == "init")
    assert first == second
    assert first[1].keys() == {"name", "id", "resume"}
    assert (first[1]["name"], first[1]["resume"]) == (output.name, "allow")
    assert [told[1] for what, told in made.got if what == "log"] == [1, 2, 4, 5]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "mine")
    assert trackers._same_run(output / "logs", continues=True) == {}
    monkeypatch.delenv("WANDB_MODE")
    assert trackers._same_run(output / "logs", continues=False)["id"] != first[1]["id"], "begun anew it is another"


def test_other_processes_have_none(tmp_path: Path) -> None:
    made = trackers.Trackers(["wandb"], "project", tmp_path, print, main=False)
    made.start({})
    made.scalars({"loss": 1.0}, 1)
    made.close()
    assert made.workers == []


def test_every_tracker_that_holds_pictures_is_accelerate_s() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(trackers.PICTURES) == set(LOGGER_TYPE_TO_CLASS)
    assert set(trackers.TABLES) <= set(LOGGER_TYPE_TO_CLASS)


def test_pictures_of_several_sizes_reach_tensorboard(tmp_path: Path) -> None:
    files = []
    for number, size in enumerate([(8, 16), (16, 8)]):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", size).save(files[-1])
    got: list[Any] = []

    class Board:
        def log_images(self, values: dict[str, Any], step: int, dataformats: str) -> None:
            got.append({name: np.asarray(value).shape for name, value in values.items()})

    trackers.PICTURES["tensorboard"](Board(), "a cat", files, 3)
    assert got == [{"a cat 0": (1, 16, 8, 3)}, {"a cat 1": (1, 8, 16, 3)}]


@pytest.mark.parametrize(
    ("rate", "said"), [(0.012345, "0.0123"), (45.67, "45.7"), (999.6, "1,000"), (33500.0, "33,500")]
)
def test_rates_have_no_exponent(rate: float, said: str) -> None:
    assert figure(rate) == said
