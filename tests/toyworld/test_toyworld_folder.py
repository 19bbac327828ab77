"""Image folders that any loader reads, and contact sheets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import toyworld as tw


def test_a_folder_holds_the_pictures_and_words_of_its_seed(tmp_path: Path) -> None:
    folder = tw.write_folder(tmp_path / "data", 12, seed=5, terse=0.0)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(list(folder.glob("*.png"))) == 12
    for index, row in enumerate(rows):
        made = tw.scene(5, index, holdout=False)
        assert row == {"file_name": f"{index:06d}.png", "text": tw.caption(made, 5, index)}
        with Image.open(folder / row["file_name"]) as picture:
            assert np.array_equal(np.asarray(picture), tw.draw(made))
    assert not list(folder.glob("*.part"))


def test_a_folder_of_a_new_shape_from_the_command_line(tmp_path: Path) -> None:
    arguments = ["--n", "3", "--shapes", "hourglass", "--count", "1", "--size", "128", "96"]
    subprocess.run([sys.executable, "-m", "toyworld", str(tmp_path), *arguments], check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert all("hourglass" in row["text"] for row in rows)
    for row in rows:
        with Image.open(tmp_path / row["file_name"]) as picture:
            assert picture.size == (96, 128)


def test_a_sheet_shows_every_picture_whole() -> None:
    pictures = [np.full((64, 128, 3), 10 * i, np.uint8) for i in range(5)]
    page = np.asarray(tw.sheet(pictures, columns=3, cell=64))
    assert page.shape == (2 * 72 + 8, 3 * 72 + 8, 3)
    assert (page[8 + 32, 8 + 32] == 0).all()
    assert (page[80 + 32, 80 + 32] == 40).all()
    assert (page[8, 8 + 32] == 238).all()  # fitted, not stretched: the page shows above a wide picture
    words = tw.sheet(pictures, ["a red ring on a blue background at the top"] * 5, columns=3, cell=64)
    assert words.height > page.shape[0]
