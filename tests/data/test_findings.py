"""What `sdxl check` finds in captions: each kind where it is, and nothing in good ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer.config import Data
from sdxl_trainer.data import findings
from sdxl_trainer.data.findings import Caption
from tests.conftest import draw_folder
from tests.data.test_captions import SCRIPTS

GOOD = [*SCRIPTS.values(), "a photo of a cat (tabby), 3:2, at 10:30", "1girl, solo, {x}, snake_case", "IMG, DSC"]


def named(text: str, reading: str = "off", **options: Any) -> set[str]:
    caption = Caption(text, "a/cat 1.png", Data(path="x", **options), reading)
    return {name for name, _, _, look in findings.CHECKS if look(caption) is not None}


@pytest.mark.parametrize("text", GOOD)
def test_good_captions_of_any_script_have_no_findings(text: str) -> None:
    assert named(text) == set()


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("a\x00cat", {}, {"characters"}),
        ("a\u200bcat", {}, {"characters"}),
        ("a \ufffd cat", {}, {"characters"}),
        ("cafÃ© and itâ€™s", {}, {"mojibake"}),
        ("cat 1", {}, {"file name"}),
        ("IMG_2041", {}, {"file name"}),
        ("my cat.JPG", {}, {"file name"}),
        ("a cat <lora:x:0.8>", {}, {"settings"}),
        ("a cat\nNegative prompt: dog", {}, {"settings", "lines"}),
        ("a <b>cat</b> &amp; dog", {}, {"markup"}),
        ("see https://a.b/c", {}, {"markup"}),
        ("a<|endoftext|>b", {}, {"special"}),
        ("a, b, A, c", {}, {"repeated"}),
        ("a\nb", {"caption_per_line": True}, set()),
        ("a (cat:1.2)", {}, {"weights"}),
        ("a {b|c}", {}, {"wildcards"}),
        ("a __b__", {}, {"wildcards"}),
        ("a {b|c", {"wildcards": True}, {"braces"}),
        ("{{a {b|c} {{", {"wildcards": True}, set()),
        ("a ||| b", {}, {"separator"}),
        ("a, b", {"keep_separator": "|||"}, {"nothing kept"}),
        ("a dog", {"trigger": "sks"}, {"no trigger"}),
        ("a [trigger] dog", {"trigger": "sks"}, set()),
    ],
)
def test_odd_captions_are_named(text: str, options: dict[str, Any], found: set[str]) -> None:
    assert named(text, **options) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("(a:1.2) [b]", set()), ("(a", {"brackets"}), ("a)", {"brackets"}), ("[a:b:0.5]", {"editing"})],
)
def test_odd_emphasis_is_named_where_it_is_read(text: str, found: set[str]) -> None:
    assert named(text, "a1111") == found
    assert named(text, "comfyui") == set()


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(*captions: str) -> Path:
        path = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        draw_folder(path, [(64, 64)] * len(captions))
        rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def test_check_lists_them_as_text_and_as_json(
    config: Callable[..., Any], folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from sdxl_trainer import check

    long = "red, blue, " + "circle, " * 115 + "square"
    path = folder(long, "red, green, blue", "red, red, IMG_1.png", "IMG_1.png")
    made = config(data=[{"path": str(path)}])
    check.run(made, as_json=True)
    whole = json.loads(capsys.readouterr().out)
    words = whole["captions"]
    assert words["pictures"] == words["captions"] == 4
    assert (words["tokens"]["largest"], words["chunks"]) == (235, {"1": 3, "3": 1})
    assert words["tags"][:2] == [["circle", 115], ["red", 4]]
    kinds = {finding["name"]: finding for finding in words["findings"]}
    assert set(kinds) == {"overlong", "file name", "repeated"}
    # 235 tokens, and chunks of 75: the comma that would be token 226 goes with what follows it.
    lost = "10 tokens are cut off: , " + "circle , " * 4 + "square"
    assert kinds["overlong"]["examples"] == [["0.png", lost]]
    assert kinds["file name"]["count"] == 1
    check.run(made)
    said = capsys.readouterr().out
    assert "tokens" in said
    assert "1 caption is cut off (0.png: '10 tokens are cut off: , circle" in said
    assert "raise text.max_chunks" in said


def test_captions_that_are_all_the_same(
    config: Callable[..., Any], folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from sdxl_trainer import check

    def kinds(**data: Any) -> dict[str, int]:
        check.run(config(data=[data]), as_json=True)
        return {f["name"]: f["count"] for f in json.loads(capsys.readouterr().out)["captions"]["findings"]}

    assert kinds(path=str(folder("a red circle", "a red circle"))) == {"equal": 2}
    bare = folder("x", "y", "z")
    (bare / "metadata.jsonl").unlink()
    (bare / "1.txt").write_text("a blue circle")
    assert kinds(path=str(bare), caption="a red circle") == {"missing": 2}
