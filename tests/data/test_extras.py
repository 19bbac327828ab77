"""What a source says besides captions: masks, focus points, kohya's folder names."""

import logging
from pathlib import Path

import pytest
from folders import captions, jsonl, records, row, write
from handmade import corners, encoded

from sdxl_trainer.errors import UserError

WHITE = encoded(corners(16, 16))


def test_kohya_s_parent_folder(tmp_path: Path) -> None:
    """<repeats>_<words>; the words stand for captions that are missing, the file beside a picture comes first."""
    files = {"10_sks dog/a.png": None, "10_sks dog/b.png": None, "10_sks dog/b.txt": "own", "1_dog/x/c.png": None}
    found = records(write(tmp_path, files), kohya_folders=True)
    assert captions(found) == {
        "1_dog/x/c.png": ("dog",),
        "10_sks dog/a.png": ("sks dog",),
        "10_sks dog/b.png": ("own",),
    }
    assert [record.repeats for record in found] == [1, 10, 10]


def test_kohya_s_folder_itself(tmp_path: Path) -> None:
    found = records(write(tmp_path / "25_a_cat", {"a.png": None}), kohya_folders=True)
    assert (found[0].repeats, found[0].captions) == (25, ("a_cat",))


def test_such_names_mean_nothing_unless_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"2024_summer/a.png": None, "2024_summer/a.txt": "x"})
    with caplog.at_level(logging.INFO, "sdxl_trainer"):
        assert records(tmp_path)[0].repeats == 1
    assert "kohya_folders = true reads repeats" in caplog.text


def test_metadata_above_kohya_s_folders(tmp_path: Path) -> None:
    listed = jsonl(row("3_cat/a.png", "a cat"), row("3_cat/b.png", None))
    found = records(
        write(tmp_path, {"3_cat/a.png": None, "3_cat/b.png": None, "metadata.jsonl": listed}), kohya_folders=True
    )
    assert [(r.captions, r.repeats) for r in found] == [(("a cat",), 3), (("cat",), 3)]


@pytest.mark.parametrize(
    ("name", "what"), [("loose.png", "1 picture lies outside of folders"), ("0_cat/a.png", "has 0 repeats")]
)
def test_pictures_that_kohya_would_leave_out_are_named(tmp_path: Path, name: str, what: str) -> None:
    write(tmp_path, {"2_cat/a.png": None, name: None, "loose.txt": "x"})
    with pytest.raises(UserError, match=what) as caught:
        records(tmp_path, kohya_folders=True)
    assert name in caught.value.what


def test_masks_beside_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "a.jpg": None,
        "x/b.png": None,
        "a-masklabel.png": WHITE,
        "x/b-masklabel.webp": WHITE,
        "c-masklabel.png": None,
    }
    with caplog.at_level(logging.INFO, "sdxl_trainer"):
        found = records(write(tmp_path, files), caption="x", mask="file")
    assert [(r.name, r.mask and r.mask.name) for r in found] == [
        ("a.jpg", "a-masklabel.png"),
        ("x/b.png", "x/b-masklabel.webp"),
    ]
    assert all(r.mask is not None and r.mask.read() == WHITE for r in found)
    assert "masks 1" in caplog.text, "one belongs to no picture"
    assert all(r.mask is None for r in records(tmp_path, caption="x"))


def test_masks_by_another_suffix(tmp_path: Path) -> None:
    files = {"a.png": None, "a_m.png": WHITE, "b-masklabel.png": None, "b-masklabel_m.png": WHITE}
    found = records(write(tmp_path, files), caption="x", mask="file", mask_suffix="_m")
    assert [(r.name, r.mask and r.mask.name) for r in found] == [
        ("a.png", "a_m.png"),
        ("b-masklabel.png", "b-masklabel_m.png"),
    ]


def test_masks_named_in_a_column_are_not_pictures_to_train(tmp_path: Path) -> None:
    rows = [{**row("a.png"), "mask": "m/1.png"}, {**row("b.png"), "mask": "m\\2.png"}]
    files = {"a.png": None, "b.png": None, "m/1.png": WHITE, "m/2.png": WHITE, "metadata.jsonl": jsonl(*rows)}
    found = records(write(tmp_path, files), mask="column")
    assert [(r.name, r.mask and r.mask.name) for r in found] == [("a.png", "m/1.png"), ("b.png", "m/2.png")]


@pytest.mark.parametrize(
    ("files", "more", "what"),
    [
        ({"b.png": None, "a-masklabel.png": WHITE}, {"mask": "file"}, "1 picture has no mask: b.png"),
        (
            {"a-masklabel.png": WHITE, "a-masklabel.webp": WHITE},
            {"mask": "file"},
            r"two masks: a.png \(a-masklabel.png and a-masklabel.webp\)",
        ),
        ({}, {"focus": "column"}, "there is no metadata file"),
        ({"metadata.jsonl": jsonl({**row("a.png"), "mask": "no.png"})}, {"mask": "column"}, "does not exist: no.png"),
        ({"metadata.jsonl": jsonl({**row("a.png"), "mask": None})}, {"mask": "column"}, "has no mask: a.png"),
        ({"metadata.jsonl": jsonl(row("a.png"))}, {"mask": "column"}, "has no column 'mask'; columns: file_name, text"),
        ({"metadata.jsonl": jsonl(row("a.png"))}, {"focus": "column"}, "has no column 'focus'"),
        (
            {"metadata.jsonl": jsonl({**row("a.png"), "focus": [0.5, 1.2]})},
            {"focus": "column"},
            r"not two shares from 0 to 1: \[0.5, 1.2\] \(metadata.jsonl:1\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_masks_and_points(tmp_path: Path, files: dict[str, bytes | str], more: dict[str, str], what: str) -> None:
    write(tmp_path, {"a.png": None, **files})
    given = {} if "metadata.jsonl" in files else {"caption": "x"}
    with pytest.raises(UserError, match=what):
        records(tmp_path, **more, **given)


@pytest.mark.parametrize(
    ("value", "point"),
    [([0, 1], (0.0, 1.0)), ("0.25, 0.5", (0.25, 0.5)), (None, None), ("", None), ((0.3, 0.7), (0.3, 0.7))],
)
def test_focus_points(tmp_path: Path, value: object, point: tuple[float, float] | None) -> None:
    write(tmp_path, {"a.png": None, "metadata.jsonl": jsonl({**row("a.png"), "focus": value})})
    assert records(tmp_path, focus="column")[0].focus == point


@pytest.mark.parametrize(
    "value", [[0.5], [0.1, 0.2, 0.3], "middle", [-0.01, 0.5], [True, "x"], {"x": 0.5}, [None, 0.5], 0.5]
)
def test_points_that_are_none(tmp_path: Path, value: object) -> None:
    write(tmp_path, {"a.png": None, "metadata.jsonl": jsonl({**row("a.png"), "focus": value})})
    with pytest.raises(UserError, match="not two shares from 0 to 1"):
        records(tmp_path, focus="column")


def test_points_in_csv(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.png": None, "b.png": None, "metadata.csv": 'file_name,text,focus\na.png,x,"0.2,0.8"\nb.png,y,\n'}
    )
    assert [record.focus for record in records(tmp_path, focus="column")] == [(0.2, 0.8), None]


def test_a_dataset_with_masks_and_points(tmp_path: Path) -> None:
    """Columns of a saved dataset: masks as stored pictures, points as lists."""
    import datasets

    picture = encoded(corners(8, 8))
    rows = {"image": [picture] * 2, "text": ["a", "b"], "mask": [WHITE, WHITE], "focus": [[0.1, 0.2], None]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    found = records(tmp_path / "saved", mask="column", focus="column")
    assert [r.focus for r in found] == [(0.1, 0.2), None]
    assert all(r.mask is not None and r.mask.read() == WHITE and r.read() == picture for r in found)
    assert found[0].mask is not None
    assert found[0].mask.stamp != found[0].stamp
    with pytest.raises(UserError, match="'mask' has no effect: this is a dataset"):
        records(tmp_path / "saved", mask="file")
    with pytest.raises(UserError, match="'caption_per_line' has no effect"):
        records(tmp_path / "saved", caption_per_line=True)
    with pytest.raises(UserError, match="'kohya_folders' has no effect"):
        records(tmp_path / "saved", kohya_folders=True)
