"""What a run says of its disk before it begins, against what it then writes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_trainer import base as bases
from sdxl_trainer import check, disk, resume, setup
from sdxl_trainer import train as runs
from sdxl_trainer.data import prepare
from sdxl_trainer.errors import UserError
from sdxl_trainer.run import CONTINUE
from sdxl_trainer.train import train
from tests.conftest import draw_folder

TRAIN = {"steps": 4, "checkpoint_every": 1, "checkpoints_limit": 2}


def predicted(config: Any, output: Path) -> disk.Need:
    base = bases.resolve(config.model, prepare.cache_folder(config))
    stock = prepare.take_stock(config, base, "fp32")
    groups, sdxl = setup.learning(config, base, stock, None)
    order = prepare.order(config, stock)
    begin = resume.starting_point(config, base, CONTINUE, output, stock, order, lambda line: None)
    return disk.need(config, base, stock, order, groups, sdxl, begin)


def written(*places: Path) -> int:
    """Bytes of the tensors' files."""
    return sum(p.stat().st_size for place in places for p in place.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": {"enabled": True}},
        {"train": {"weights": "bf16"}, "ema": {"enabled": True}, "optimizer": {"name": "adamw_bf16"}},
        {"optimizer": {"name": "schedulefree"}, "schedule": {"name": "constant"}},
        {"adapter": {"rank": 64}, "ema": {"enabled": True}},
        {"learn": [{"match": r"unet\.mid.*"}, {"match": r"text_encoder_2\..*layers\.1\..*"}]},
        {"export": {"formats": ["single"], "dtype": "fp16"}},
    ],
    ids=str,
)
def test_it_is_what_is_written(config: Callable[..., Any], tmp_path: Path, options: dict[str, Any]) -> None:
    made = config(**{**options, "train": {**TRAIN, **options.get("train", {})}})
    need = predicted(made, tmp_path / "run")
    output = train(made)
    kept = sorted(output.glob("checkpoint-*"))
    assert len(kept) == 2
    assert need.most == 3, "the oldest goes once the newest is verified"
    assert need.checkpoint == pytest.approx(written(kept[0]), rel=0.06), "headers of small tensors are not counted"
    assert need.result == pytest.approx(written(output) - written(*kept) - written(output / "samples"), rel=0.06)
    # One checkpoint more than stay, or the result beside those that do.
    assert need.together - need.rows == max(3 * need.checkpoint, 2 * need.checkpoint + need.result)


def test_what_lies_there_already_needs_no_room(config: Callable[..., Any], tmp_path: Path) -> None:
    train(config(train={**TRAIN, "steps": 3}))
    more = predicted(config(train=TRAIN), tmp_path / "run")
    assert (more.most, more.together) == (3, max(more.checkpoint, more.result))
    every = predicted(config(train={**TRAIN, "steps": 103, "checkpoints_limit": None}), tmp_path / "run")
    assert every.together == 100 * every.checkpoint + every.result
    assert predicted(config(train={"steps": 9, "checkpoint_every": 0}), tmp_path / "run").together == more.result


def test_what_is_to_be_encoded_counts(config: Callable[..., Any], tmp_path: Path) -> None:
    made = config(cache={"path": str(tmp_path / "cold")}, train={"steps": 1})
    need = predicted(made, tmp_path / "run")
    assert need.together == need.result + need.rows
    train(made)
    assert need.rows == pytest.approx(written(tmp_path / "cold"), rel=0.1)
    assert predicted(config(cache={"path": str(tmp_path / "cold")}, train={"steps": 2}), tmp_path / "run").rows == 0


@pytest.mark.parametrize(("spare", "said"), [(-1, True), (0, False)])
def test_too_little_for_all_is_said_and_too_little_for_one_refused(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, spare: int, said: bool
) -> None:
    made = config(train=TRAIN)
    train(config(output_dir=str(tmp_path / "other")))  # all is encoded
    need = predicted(made, tmp_path / "run")
    room = int(need.together) + spare
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room))
    check.run(made)
    assert ("too little; free some space" in capsys.readouterr().out) == said
    train(made)
    assert ("the disk may not do" in (told := capsys.readouterr().err)) == said
    assert ("3 checkpoints of " in told) == said
    shutil.rmtree(tmp_path / "run")
    room = int(need.certain) - 1
    with pytest.raises(UserError, match=r"a checkpoint takes .* and the disk has .* free"):
        train(made)
    assert not (tmp_path / "run").exists(), "what is refused leaves nothing behind"


def test_a_run_that_is_refused_leaves_no_folder_of_its_own(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it noted of a few pictures is found again in no time; much of it stays, and so does what was there."""
    (tmp_path / "pictures").mkdir()
    made = config(data=[{"path": str(draw_folder(tmp_path / "pictures", [(64, 64)] * 3))}], cache={"path": None})
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    output = tmp_path / "run"

    def refused() -> list[str]:
        with pytest.raises(UserError, match="not a picture that can be read"):
            train(made)
        return sorted(path.name for path in output.iterdir()) if output.exists() else []

    assert not refused()
    assert not output.exists()
    output.mkdir()
    assert refused() == ["cache"]
    shutil.rmtree(output)
    monkeypatch.setattr(runs, "LITTLE", 10)
    assert refused() == ["cache"]
