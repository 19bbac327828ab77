"""The report page: shows the numbers of the run, escapes everything, loads nothing, bears missing and broken parts."""

import base64
import hashlib
import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trainer import report
from sdxl_trainer.report import charts, words
from tests.fake_runs import HOSTILE, MANIFEST, draw_samples, fake_run, metrics, picture, write_metrics


class Page(HTMLParser):
    """What the tests ask of a page: its tags, that they close, and its text."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Image.Image]:
        urls = [image["src"] for image in self.all("img") if "src" in image]
        assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
        return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def written(folder: Path) -> Page:
    path = report.write(folder)
    assert path == folder / "report.html"
    assert [p.name for p in folder.iterdir() if "tmp" in p.name] == []
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("report") / "shapes")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return written(run)


def test_shows_the_numbers_of_the_run(page: Page, run: Path) -> None:
    for shown in (
        "shapes done",
        "micro fine-tuned (5.68 M of 6.91 M parameters) on 1,234 pictures from shapes, using AMD EPYC 7B13",
        "Finished after 400 steps in 6 min 12 s.",
        "started 2025-03-01 09:15 · ended 2025-03-01 09:21",
        "1,234 pictures with 2,468 captions.",
        "photos/shapes 1,234 128 yes",
        "5,678,901 parameters learned, 1,234,567 stayed as they were (82.14 % learned).",
        "unet\\..* 321 5,678,901 1e-4",
        "training 4 min 50 s 78.0 %",
        "training steps and all else 6.65 s 1.8 %",
        "sdxl train 'shapes config.toml' train.steps=400",
        "memory gb 15.6",
        "torch 2.8.0+cpu",
        "ab" * 32,
        'from_pretrained("runs/shapes"'.replace('"', "'"),
        "guidance_scale=4.5",
        "sdxl sample runs/shapes --prompt 'a red circle' --out pictures",
        "median, 1,600 seen",
    ):
        assert shown in page.text
    losses = [row["loss"] for row in metrics(400)]
    average, keep = 0.0, 1 - 1 / 20
    for loss in losses:
        average = keep * average + (1 - keep) * loss
    assert f"Smoothed loss {words.short(average / (1 - keep**400))} over about 20 steps" in page.text


def test_curves_hold_the_measured_points(page: Page) -> None:
    figures = [f for f in page.all("figure") if "data-points" in f]
    measured = ["Validation loss", "Validation loss by timestep"]
    titles = [chart.title for chart in charts.CHARTS]
    assert [f["data-title"] for f in figures] == [titles[0], *measured, *titles[1:]]
    figures = [figures[0], *figures[3:]]
    rows = metrics(400)
    for figure, chart in zip(figures, charts.CHARTS, strict=True):
        data = json.loads(figure["data-points"])
        assert data["x"] == list(range(1, 401))
        assert data["values"][0] == pytest.approx([row[chart.key] for row in rows], rel=1e-3)
    assert "3 values lie above the frame" in page.text
    assert "surprise" not in page.text
    spoken = [svg["aria-label"] for svg in page.all("svg")]
    assert spoken[0].startswith(f"Training loss over 400 steps: first {words.short(rows[0]['loss'])}, last")


def test_loads_nothing_and_runs_only_its_own_script(page: Page, run: Path) -> None:
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "://" not in source
    assert not re.search(r"url\(|@import|srcset", source)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "form", "base"} == set()
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    script = source.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(page: Page, run: Path) -> None:
    assert HOSTILE in page.text
    assert (run / "report.html").read_text(encoding="utf-8").count("<script") == 1
    assert any(HOSTILE in image.get("alt", "") for image in page.all("img"))


def test_hostile_values_everywhere(tmp_path: Path) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {f"{key}<script>" if key in value.get("x", ()) else key: poisoned(v) for key, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return f"{value}{HOSTILE}\ud800" if isinstance(value, str) else value

    manifest = poisoned(MANIFEST)
    for name in ("versions", "hardware", "timings"):
        manifest[name][HOSTILE] = 1.5
    manifest["base"]["hashes"][HOSTILE] = HOSTILE
    manifest["data"]["sets"][0][HOSTILE] = HOSTILE
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "config.toml").write_text(f"# {HOSTILE}\noutput_dir = '''{HOSTILE}'''\n", encoding="utf-8")
    found = written(tmp_path)
    assert len(found.all("script")) == 1
    assert found.all("img") == []


def test_pictures_by_prompt_seed_and_step(page: Page) -> None:
    picks = [button["data-step"] for button in page.all("button") if "pick" in button.get("class", "")]
    assert len(picks) == len(page.images()) == 3 * 2 * (5 + 4)
    assert picks[:9] == ["0", "100", "200", "300", "400"] + ["100", "200", "300", "400"]
    assert {image.size for image in page.images()} == {(128, 128)}
    alts = [image["alt"] for image in page.all("img") if "src" in image]
    assert "step 100, seed 1, ema weights: a blue square" in alts
    assert next(i for i in page.all("input") if i.get("id") == "steps")["max"] == "4"


def test_everything_has_a_name(page: Page) -> None:
    """Pictures, fields and buttons are named, and every reference leads somewhere."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {label["for"] for label in page.all("label")}
    assert {field["id"] for field in page.all("input")} <= labelled
    assert all("alt" in image for image in page.all("img"))
    named = [a[key] for _, a in page.tags for key in ("aria-labelledby", "for") if key in a]
    assert set(named) <= set(ids)


PARTS = ("config.toml", "manifest.json", "metrics.jsonl", "samples/samples.jsonl")


@pytest.mark.parametrize("missing", PARTS)
@pytest.mark.parametrize("only", [False, True])
def test_any_part_may_be_missing(tmp_path: Path, missing: str, only: bool) -> None:
    folder = fake_run(tmp_path / "run", steps=100, prompts=("a red circle",), ema=False)
    for name in PARTS:
        if (name == missing) != only:
            (folder / name).unlink()
    found = written(folder)
    assert ("Training loss" in found.text) == ((missing == "metrics.jsonl") == only)
    assert ("Pictures Each row" in found.text) == ((missing == "samples/samples.jsonl") == only)


@pytest.mark.parametrize("name", ["config.toml", "manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["", "{", "[1]\n", "null", '{"step": 1, "loss": null}\n', "\0\ufffd\n"])
def test_broken_parts_are_said_not_fatal(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert "page written" in written(tmp_path).text


def test_wrong_types_are_borne(tmp_path: Path) -> None:
    for wrong in (None, 3, "text", [1, [2]], {"a": {"b": 1}}, 10**400, True):
        manifest = dict.fromkeys(MANIFEST, wrong)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        written(tmp_path)
        nested = {key: dict.fromkeys(value, wrong) for key, value in MANIFEST.items() if isinstance(value, dict)}
        (tmp_path / "manifest.json").write_text(json.dumps(nested), encoding="utf-8")
        write_metrics(tmp_path, [{"step": 1, "loss": wrong, "grad_norm": wrong, "epoch": wrong}])
        written(tmp_path)


def test_a_run_that_stopped(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=1000, taken=300, prompts=("a red circle",))
    found = written(folder)
    assert "Not finished when this page was written: at step 300 of 1,000." in found.text
    assert "The same command continues it" in found.text
    manifest = {**MANIFEST, "finished": "2025-03-01T09:21:12+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "Stopped at step 300 of 1,000 in 6 min 12 s." in written(folder).text


def test_steps_taken_again_after_an_interruption_count_once(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)] + [{"step": step, "loss": 0.5} for step in (3, 4, 5)]
    write_metrics(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    found = written(tmp_path)
    data = json.loads(found.all("figure")[0]["data-points"])
    assert (data["x"], data["values"][0]) == ([1, 2, 3, 4, 5], [1, 1, 0.5, 0.5, 0.5])
    assert "metrics.jsonl has 1 line that is not a record of a step." in found.text


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    losses = [0.5, math.nan, 0.4, math.inf, 0.3]
    write_metrics(tmp_path, [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    found = written(tmp_path)
    assert "The loss was not a finite number at step 2, 4." in found.text
    assert json.loads(found.all("figure")[0]["data-points"])["x"] == [1, 3, 5]


def test_only_files_in_samples_are_shown(tmp_path: Path) -> None:
    draw_samples(tmp_path, ("a red circle",), range(0, 1), 1, 32, False)
    picture("secret", 0, 1, 32).save(tmp_path / "secret.png")
    (tmp_path / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "samples" / "broken.png").write_bytes(b"no picture")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "broken.png", "gone.png", "a\0b", ".", 7, None]
    rows = [{"step": 1, "file": name, "prompt": f"p{i}", "seed": 0, "weights": "raw"} for i, name in enumerate(names)]
    with (tmp_path / "samples" / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = written(tmp_path)
    assert len(found.images()) == 1
    assert "Not shown, because they are not files in samples/: ../secret.png" in found.text
    assert "Not shown, because they are not readable as pictures: broken.png." in found.text


def test_a_long_run_stays_mailable(tmp_path: Path) -> None:
    """100,000 steps, noise that no format can shrink, a prompt of a megabyte: under 5 MB, with both ends shown."""
    draw = random.Random(0)
    losses = [draw.random() for _ in range(100_000)]
    lines = (f'{{"step": {i + 1}, "loss": {loss}, "grad_norm": {loss}}}\n' for i, loss in enumerate(losses))
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "samples").mkdir()
    noise = Image.effect_noise((700, 500), 120).convert("RGB")
    noise.save(tmp_path / "samples" / "noise.jpg", quality=95)
    rows = [
        {
            "step": step,
            "file": f"{step}-{i}.jpg",
            "prompt": f"{i}{'x' * 1_000_000 * (i == 0)}",
            "seed": 1,
            "weights": "raw",
        }
        for step in range(0, 100_001, 10_000)
        for i in range(6)
    ]
    for row in rows:
        (tmp_path / "samples" / row["file"]).hardlink_to(tmp_path / "samples" / "noise.jpg")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples" / "samples.jsonl").write_text(text, encoding="utf-8")
    found = written(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    steps = {int(button["data-step"]) for button in found.all("button") if "data-step" in button}
    assert {0, 100_000} < steps
    assert f"Shown: {len(steps)} of 11 steps; all 66 pictures are in samples/." in found.text
    assert max(max(image.size) for image in found.images()) <= 512
    assert "(1,000,001 characters)" in found.text
    data = json.loads(found.all("figure")[0]["data-points"])
    assert len(data["x"]) <= charts.LIMIT + 2
    assert max(data["values"][0]) == pytest.approx(max(losses), rel=1e-3)
