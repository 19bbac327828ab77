"""The demo, shortened: its steps, its files, and the micro-SDXL that comes with the package."""

import json
from pathlib import Path

import pytest

from sdxl_trainer import demo, files


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ASKED", {"new": 2, "old": 3})
    monkeypatch.setattr(demo, "SHOWN", {"new": 1, "old": 1})
    monkeypatch.setattr(demo, "PICTURES", {"new": 2, "old": 4})
    monkeypatch.setattr(demo, "DRAWING", {**demo.DRAWING, "num_inference_steps": 1})


def test_the_demo_measures_before_and_after(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(tmp_path, steps=2)
    output = tmp_path / "run"
    assert (output / "before-after.png").stat().st_size > 1000
    accuracy = json.loads((output / "accuracy.json").read_text())
    assert accuracy["before"].keys() == accuracy["after"].keys() == {"new", "old"}
    said = capsys.readouterr().out
    assert "2 pictures with an hourglass" in said
    assert str(output / "report.html") in said
    rows = [json.loads(line) for line in (tmp_path / "new" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all("hourglass" in row["text"] for row in rows)
    assert len(list((tmp_path / "old").glob("*.png"))) == 4


def test_the_base_that_comes_with_the_package_is_whole_and_small() -> None:
    recorded = json.loads((demo.BASE / "hashes.json").read_text())
    found = files.tree_hashes(demo.BASE)
    found.pop("hashes.json")
    assert found == recorded
    assert sum(path.stat().st_size for path in demo.BASE.rglob("*") if path.is_file()) <= 20e6
