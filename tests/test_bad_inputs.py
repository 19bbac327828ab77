"""Bad inputs: each ends with exit 2 and three lines (what, where, how to fix), and leaves earlier results alone."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import files
from tests.bad_inputs import (
    adapter_rows,
    caption_rows,
    config_rows,
    data_rows,
    geometry_rows,
    model_rows,
    more_rows,
    place,
    prior_rows,
    run_rows,
    start_rows,
)
from tests.bad_inputs.place import Bad

TABLE = [
    *caption_rows.ROWS,
    *config_rows.ROWS,
    *data_rows.ROWS,
    *geometry_rows.ROWS,
    *model_rows.ROWS,
    *run_rows.ROWS,
    *more_rows.ROWS,
    *adapter_rows.ROWS,
    *start_rows.ROWS,
    *prior_rows.ROWS,
]


@pytest.fixture(scope="module")
def pristine(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place with a finished run of two steps. After all rows, every byte of it must be as before."""
    from sdxl_trainer.configfile import validated
    from sdxl_trainer.train import train

    root = tmp_path_factory.mktemp("pristine")
    shutil.copytree(base, root / "base")
    shutil.copytree(pictures, root / "pictures")
    options = place.tree()
    options["train"]["steps"] = 2
    with contextlib.chdir(root):
        train(validated(options, "pristine"))
    before = files.tree_hashes(root)
    yield root
    assert files.tree_hashes(root) == before


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with monkeypatch.context() as patch:
        place.prepare(bad, pristine, tmp_path, patch)
        patch.chdir(tmp_path)
        before = place.snapshot(tmp_path, bad.begins)
        capfd.readouterr()
        status = place.run_here(bad.command, patch)
    said = capfd.readouterr()
    after = place.snapshot(tmp_path, bad.begins)
    assert status == 2, said.err
    explains(bad, said.err)
    assert said.out == ""
    assert {name: after.get(name) for name in before} == before
    assert place.leftovers(tmp_path) == []
    if bad.begins:
        rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        assert rows[:2] == (pristine / "run/metrics.jsonl").read_text().splitlines()


def explains(bad: Bad, stderr: str) -> None:
    """Three lines: what is wrong, where, and how to fix it."""
    lines = place.complaint(stderr)
    assert [line[:6] for line in lines] == ["error:", "   at:", "  fix:"], stderr
    assert re.search(bad.says, lines[0]), stderr
    assert re.search(bad.at, lines[1]), stderr
    assert re.search(bad.fix, lines[2]), stderr
    assert all(line[6:].strip() for line in lines), stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("name", ["TOML syntax", "UNet cut short", "checkpoint with a changed byte"])
def test_bad_input_in_a_process_of_its_own(
    name: str, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = next(row for row in TABLE if row.name == name)
    place.prepare(bad, pristine, tmp_path, monkeypatch)
    before = place.snapshot(tmp_path, bad.begins)
    command = [sys.executable, "-m", "sdxl_trainer", *bad.command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 3
    explains(bad, done.stderr)
    after = place.snapshot(tmp_path, bad.begins)
    assert {path: after.get(path) for path in before} == before


def test_file_names_that_are_not_utf8_are_remembered(tmp_path: Path) -> None:
    files.write_json(tmp_path / "files.json", {"\udcff.png": [1]})
    assert json.loads((tmp_path / "files.json").read_text(encoding="utf-8")) == {"\udcff.png": [1]}


def test_names_are_distinct() -> None:
    assert len({bad.name for bad in TABLE}) == len(TABLE) >= 50
