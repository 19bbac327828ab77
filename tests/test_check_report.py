"""`sdxl check --report` and `--json` on a messy folder: every picture accounted for, every finding with its fix."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdxl_trainer import check
from sdxl_trainer.data import survey
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.picture_findings import rectangle
from sdxl_trainer.errors import UserError
from tests.browser import Browser, needs_browser
from tests.test_report import HOSTILE, Page


def scene(number: int, width: int = 120, height: int = 90) -> Image.Image:
    """A picture with large parts, different for each number."""
    draw = np.random.default_rng(number)
    image = Image.new("RGB", (width, height), tuple(draw.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        (x0, x1), (y0, y1) = sorted(draw.integers(0, width, 2)), sorted(draw.integers(0, height, 2))
        pen.rectangle((x0, y0, x1, y1), fill=tuple(draw.integers(0, 256, 3).tolist()))
    return image


def content(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messy")
    files = {f"{i}.png": content(scene(i)) for i in range(6)}
    files |= {
        "copy.png": files["0.png"],
        "near.jpg": content(scene(1).resize((100, 75)), "JPEG", quality=60),
        "wide.png": content(scene(20, 400, 90)),
        "small.png": content(scene(21, 40, 30)),
        "grey.png": content(Image.new("RGB", (90, 90), "grey")),
        "page.png": b"<!DOCTYPE html><p>not found",
        "empty.png": b"",
        "tiny.png": content(scene(22, 7, 7)),
        "ribbon.png": content(scene(23, 2000, 60)),
        "<img src=x onerror=alert(1)>.png": content(scene(24)),
        "bare.png": content(scene(25)),
        "cut.jpg": content(scene(26, 300, 300), "JPEG", quality=95)[:3000],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        text = HOSTILE if "<" in name else f"{name.split('.')[0]}th circle, red"
        if name != "bare.png":
            (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    (folder / "notes.docx").write_bytes(b"x")
    (folder / ".hidden").write_bytes(b"x")
    (folder / "orphan.txt").write_text("x")
    return folder


def checked(made: Any, capsys: pytest.CaptureFixture[str], **options: bool) -> dict[str, Any]:
    with pytest.raises(UserError):
        check.run(made, as_json=True, **options)
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


def test_every_picture_is_accounted_for(
    config: Callable[..., Any], messy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = checked(config(data=[{"path": str(messy), "resolution": 64, "buckets": "none"}]), capsys)
    (row,) = facts["counts"]
    pictures = [p for p in messy.iterdir() if p.suffix in {".png", ".jpg"}]
    assert row["trained"] + row["held_out"] + row["unusable"] == len(pictures)
    assert row["skipped"] == {".docx": 1, "hidden": 1, "caption files not used": 2}
    found = {finding["name"]: finding for finding in facts["findings"]}
    one = {"uncaptioned", "zero", "unreadable", "damaged", "copies", "near copies", "empty", "markup"}
    assert {name: found[name]["count"] for name in one} == dict.fromkeys(one, 1)
    unfit = [finding for finding in facts["findings"] if finding["name"] == "unfit"]
    assert sorted(finding["examples"][0][0] for finding in unfit) == ["ribbon.png", "tiny.png"]
    assert found["damaged"]["examples"][0][0] == "cut.jpg"
    assert found["near copies"]["examples"] == [["1.png", "same as near.jpg"]]
    assert found["copies"]["examples"] == [["0.png", "same as copy.png"]]
    assert found["cut off"]["examples"][0][0] == "wide.png"
    assert [name for name, _ in found["enlarged"]["examples"]] == ["small.png"]
    assert all(finding["fix"] for finding in facts["findings"])
    levels = [finding["level"] for finding in facts["findings"]]
    assert levels == sorted(levels, key=["stops", "harms", "look"].index)
    assert sum(bucket["pictures"] for bucket in facts["buckets"]) == row["trained"]
    assert facts["to_encode"]["latents"] == row["trained"] - 1  # of two copies one
    assert facts["time"]["seconds"] > 0


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_are_named(
    config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Of their frames all but the first are left out, which is not to be silent; a still picture is none."""
    (tmp_path / "set").mkdir()
    frames = [scene(i, 80, 80) for i in range(3)]
    frames[0].save(tmp_path / f"set/moving.{kind}", save_all=True, append_images=frames[1:])
    scene(3, 80, 80).save(tmp_path / f"set/still.{kind}")
    frames[1].save(tmp_path / "set/phone.jpg", "MPO", save_all=True, append_images=[frames[2]])
    for name, text in (("moving", "a red circle"), ("still", "a blue square"), ("phone", "green")):
        (tmp_path / f"set/{name}.txt").write_text(text)
    check.run(config(data=[{"path": str(tmp_path / "set")}]), as_json=True)
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["name"], finding["count"], finding["level"]) == ("animations", 1, "look")
    assert finding["examples"] == [[f"moving.{kind}", ""]]


def test_nothing_is_found_in_good_pictures(
    config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good").mkdir()
    for i in range(4):
        scene(i, 80, 80).save(tmp_path / f"good/{i}.png")
        (tmp_path / f"good/{i}.txt").write_text(["a red circle", "a blue square", "green", "blue"][i])
    check.run(config(data=[{"path": str(tmp_path / "good")}]), as_json=True)
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.fixture(scope="module")
def page(base: Path, messy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdxl_trainer.configfile import validated

    out = tmp_path_factory.mktemp("out")
    made = validated(
        {
            "output_dir": str(out),
            "model": {"path": str(base)},
            "data": [{"path": str(messy), "resolution": 64, "buckets": "area", "bucket_step": 8}],
            "train": {"steps": 10, "batch_size": 2, "learning_rate": 1e-3},
        },
        "test.toml",
    )
    with pytest.raises(UserError, match="1 picture has no caption"):
        check.run(made, report=True)
    return out / "check.html"


def test_the_page_is_whole_and_hostile_text_stays_text(page: Path) -> None:
    read = Page(page.read_text(encoding="utf-8"))
    assert HOSTILE in read.text
    assert "<img src=x onerror=alert(1)>.png" in read.text
    assert page.read_text(encoding="utf-8").count("<script") == 1
    assert len(read.images()) >= 10
    for words in ("not ready", "To do:", "Look alike", "Sizes that are trained", "1.png", "caption files not used 2"):
        assert words in read.text
    assert all(not any(name.startswith("on") for name in attributes) for _, attributes in read.tags)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(page: Path, browser: Browser, width: int, dark: bool) -> None:
    seen = browser.look(page, width, dark)
    assert seen.console == []
    assert seen.requests == []
    assert seen.overflow == 0
    assert seen.pale == []
    assert seen.broken == 0
    assert (seen.background == "rgb(18, 19, 22)") == dark


def test_the_drawn_rectangle_is_the_crop() -> None:
    geometry = Geometry((100, 300), (64, 192), (0, 10), (64, 64), False)
    assert rectangle(geometry) == (10 / 192, 0, 64 / 192, 1)
    mirrored = Geometry((100, 300), (64, 192), (0, 10), (64, 64), True)
    assert rectangle(mirrored) == ((192 - 10 - 64) / 192, 0, 64 / 192, 1)


def test_near_copies_are_found_and_different_pictures_are_not() -> None:
    looks = {}
    for i in range(40):
        whole = scene(i, 200, 150)
        looks[i] = survey.look(whole)
        small = whole.resize((90, 70))
        looks[100 + i] = survey.look(Image.open(io.BytesIO(content(small, "JPEG", quality=30))))
    groups = survey.near_copies(looks)
    assert sorted(groups) == [[i, 100 + i] for i in range(40)]
    empty = {i: survey.look(Image.new("RGB", (50, 50), (i, i, i))) for i in range(5)}
    assert survey.near_copies(empty) == []
    assert survey.flat(empty) == list(range(5))


def test_at_most_so_many_pictures_are_looked_at(config: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    from sdxl_trainer.data.memo import open_memo
    from sdxl_trainer.data.pictures import load

    found = load(config(data=[{"path": str(pictures), "more_resolutions": [32]}]), open_memo(tmp_path))
    assert len(found) == 12
    assert survey.chosen(found) == [0, 2, 4, 6, 8, 10]
    assert survey.chosen(found, 3) == [0, 4, 8]
