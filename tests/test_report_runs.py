"""What the page says of validation, data and how to use the result; runs side by side; headless Chromium."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import cli, report
from sdxl_trainer.errors import UserError
from sdxl_trainer.report import compare, validation
from sdxl_trainer.train import train
from tests.browser import Browser, needs_browser
from tests.fake_runs import HOSTILE, MANIFEST, fake_run, metrics, validation_rows, write_metrics
from tests.test_report import Page, written


def parsed(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_verdict_compares_picture_by_picture() -> None:
    falling = validation_rows(400, ema=False)
    (said,) = validation.words(falling)
    assert said.startswith("On held-out pictures the loss fell from 0.295 at step 0 to ")
    assert "picture by picture" in said
    told = validation.words(validation_rows(400, ema=False, rise=0.4))
    assert len(told) == 2
    assert "learns its pictures by heart" in told[1]
    first = {**falling[0], "pictures": [1.0, 2.0, 3.0]}
    same = [first, {**first, "step": 10, "pictures": [1.1, 1.9, 3.0], "loss": first["loss"]}]
    (unclear,) = validation.words(same)
    assert "has not clearly changed" in unclear
    assert validation.words(falling[:1]) == []


def test_the_page_says_what_captions_save() -> None:
    rows = validation_rows(400, ema=False)
    shares = {0: 2.0, 400: 4.0}
    without = [
        {**row, "set": "uncaptioned", "loss": row["loss"] * shares[row["step"]]}
        for row in rows
        if row["set"] == "held_out" and row["step"] in shares
    ]
    told = validation.words([*rows, *without])
    assert told[-1] == "Captions lower this loss by 75.0 %; at step 0 they did by 50.0 %."
    known = validation.measures([*rows, *without])
    assert validation.gained(known, "raw") == [(0, 50.0), (400, 75.0)]
    assert "without captions" not in validation.figures([*rows, *without]), "a line of its own, in percent"


def test_the_interval_of_a_change_is_student_s() -> None:
    before = validation.Measure(0, 0.0, None, [], [], [1.0, 2.0, 4.0, 8.0])
    after = validation.Measure(1, 0.0, None, [], [], [0.9, 1.8, 3.7, 7.6])
    change = validation.change(before, after)
    assert change is not None
    mean, half = change
    ratio = (0.9 * 0.9 * 0.925 * 0.95) ** 0.25
    assert mean == pytest.approx(100 * (ratio - 1))
    assert half == pytest.approx(100 * ratio * 3.182 * 0.025915 / 2, rel=1e-3)


@pytest.mark.parametrize(
    "row",
    [
        {"step": 1},
        {"step": 1, "set": "held_out", "weights": "raw", "loss": "x"},
        {"step": 1, "set": HOSTILE, "weights": "raw", "loss": 1.0},
        {"step": 1, "set": "held_out", "weights": "raw", "loss": 1.0, "timesteps": "x", "by_timestep": [None]},
        {"step": 1, "set": "held_out", "weights": "raw", "loss": 1.0, "timesteps": [1, 2], "by_timestep": [1.0]},
    ],
)
def test_strange_measures_are_borne(tmp_path: Path, row: dict[str, Any]) -> None:
    folder = fake_run(tmp_path / "run", steps=100, prompts=("a",), ema=False)
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    written(folder)


def test_what_became_of_the_pictures(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=100, prompts=("a",), ema=False)
    ledger = [["832 x 1216", "12 pictures, 3.1% cut off"], ["duplicates", HOSTILE]]
    manifest = {**MANIFEST, "data": {**MANIFEST["data"], "ledger": ledger}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    page = written(folder)
    assert "832 x 1216 12 pictures, 3.1% cut off" in page.text
    assert HOSTILE in page.text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (None, "", ["models/checkpoints", "sdxl convert runs/shapes shapes.safetensors"]),
        (
            "pytorch_lora_weights.safetensors",
            "",
            ["models/loras", "--to kohya", "<lora:shapes:1>", "--lora runs/shapes"],
        ),
        ("learned_embeds.safetensors", "", ["models/embeddings", "--embedding runs/shapes"]),
        ("shapes.safetensors", "", ["shapes.safetensors lies in this folder already"]),
        (
            "model_index.json",
            '{"_class_name": "StableDiffusionXLInpaintPipeline"}',
            ["StableDiffusionXLInpaintPipeline.from_pretrained", "mask_image=mask", "--mask mask.png"],
        ),
    ],
)
def test_how_to_use_the_result_fits_what_it_is(tmp_path: Path, file: str | None, content: str, said: list[str]) -> None:
    folder = fake_run(tmp_path / "run", steps=100, prompts=("a",), ema=False)
    if file:
        (folder / file).write_text(content, encoding="utf-8")
    text = written(folder).text
    for words in said:
        assert words in text
    code = report.use._python(report.records.read(folder), "runs/shapes", "a 'quoted' prompt\n")
    compile(code, "shown", "exec")


def test_how_to_use_the_result_of_an_adapter_that_is_still_in_training(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", steps=100, prompts=("a",), ema=False)
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    with (folder / "config.toml").open("a", encoding="utf-8") as config:
        config.write("\n[adapter]\nrank = 4\n")
    text = written(folder).text
    for words in ("Once it is complete", "load_lora_weights", "--to kohya", "models/loras"):
        assert words in text
    assert "models/checkpoints" not in text


def test_how_to_use_new_words_and_an_adapter_together(
    config: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page says to type does draw with both."""
    made = config(
        adapter={"kind": "lokr", "rank": 2, "parts": ["unet", "text_encoder_2"]},
        token=[{"name": "<one>"}, {"name": "<two>", "vectors": 2}],
        data=[{"caption": "a red <one> and <two>", "caption_only": True}],
        train={"steps": 1, "checkpoint_every": 0},
    )
    folder = train(made)
    run = report.records.read(folder)
    text = written(folder).text
    for words in ("files of embeddings/", "models/loras", f"--lora {folder} --embedding {folder}"):
        assert words in text
    assert sorted(p.name for p in (folder / "embeddings").iterdir()) == ["one.safetensors", "two.safetensors"]
    code = report.use._python(run, str(folder), "a red <one> and <two>")
    sizes = "height=64, width=64, guidance_scale"
    for old, new in (("guidance_scale", sizes), ("steps=25", "steps=1")):
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of their own versions
        exec(code, names)
    assert (tmp_path / "picture.png").is_file()
    pipeline = names["pipeline"]
    assert type(pipeline.unet).__name__ == "PeftModel"
    ids = pipeline.tokenizer_2("<one> <two>", add_special_tokens=False)["input_ids"]
    first = len(pipeline.tokenizer_2) - 3
    assert ids[0] == first


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    one = fake_run(tmp_path / "a" / "run", steps=400, ema=False)
    two = fake_run(tmp_path / "b" / "run", steps=400, ema=False)
    text = (two / "config.toml").read_text(encoding="utf-8")
    (two / "config.toml").write_text(text.replace("learning_rate = 1e-4", "learning_rate = 3e-4"), encoding="utf-8")
    return [one, two]


def test_runs_side_by_side(pair: list[Path], tmp_path: Path) -> None:
    page = parsed(compare.write(pair, tmp_path / "compare.html"))
    assert "2 runs compared" in page.text
    assert "train.learning_rate 0.0001 0.0003" in " ".join(page.text.split())
    assert "train.batch_size" not in page.text, "what is the same is not listed"
    charts = {f["data-title"]: json.loads(f["data-points"]) for f in page.all("figure") if "data-points" in f}
    assert charts["Validation loss"]["names"] == ["a/run", "b/run"]
    assert charts["Training loss, smoothed"]["x"][-1] == 400
    assert len(page.all("img")) == 2 * 3 * 2, "the last picture of each prompt and seed of each run"
    assert HOSTILE in page.text
    assert page.all("script") == [{}]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "–"),
        (False, "false"),
        (1e-6, "1e-06"),
        ("all", "all"),
        (["unet"], "[&quot;unet&quot;]"),
        ("<b>", "&lt;b&gt;"),
    ],
)
def test_settings_are_told_as_a_config_says_them(value: object, told: str) -> None:
    assert compare._value(value) == told


def test_runs_of_different_lengths_share_an_axis(tmp_path: Path) -> None:
    one = fake_run(tmp_path / "one", steps=400, prompts=("a",), ema=False)
    two = fake_run(tmp_path / "two", steps=200, prompts=("b",), ema=False)
    page = parsed(compare.write([one, two], tmp_path / "c.html"))
    data = next(json.loads(f["data-points"]) for f in page.all("figure") if f.get("data-title") == "Learning rate")
    assert data["names"] == ["one", "two"]
    assert data["values"][1][-1] is None
    assert data["values"][0][-1] is not None
    assert "Their last pictures" not in page.text, "no prompt in common"


def test_what_cannot_be_compared_is_refused(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(UserError, match="given twice"):
        compare.write([pair[0], pair[0]], tmp_path / "c.html")
    with pytest.raises(UserError, match="too many"):
        compare.write(pair * 7, tmp_path / "c.html")
    with pytest.raises(UserError, match="there is no folder"):
        compare.write([pair[0], tmp_path / "nothing"], tmp_path / "c.html")
    monkeypatch.setattr("sys.argv", ["sdxl", "report", str(pair[0]), "--out", str(tmp_path / "x.html")])
    assert cli.guarded(cli.command) == 2
    assert "--out with one run" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["sdxl", "report", *map(str, pair), "--out", str(tmp_path / "x.html")])
    assert cli.guarded(cli.command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.html")


def test_the_page_is_there_while_the_run_goes_on(config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_trainer.train import train

    sizes: list[int] = []
    original = report.write

    def spy(folder: Path) -> Path:
        path = original(folder)
        sizes.append(parsed(path).text.count("Validation loss by timestep"))
        return path

    monkeypatch.setattr(report, "write", spy)
    monkeypatch.setattr("sdxl_trainer.finish.REPORT_SHARE", 1.0)
    output = train(config(validation={"loss_every": 1}, train={"steps": 2}))
    assert len(sizes) >= 2
    assert all(sizes)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(row["memory_gb"] > 0.05 for row in rows)
    ledger = json.loads((output / "manifest.json").read_text())["data"]["ledger"]
    assert ["64 x 64", "6 pictures, 24.6% cut off"][0] in dict(ledger)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with hostile texts, a long one, and two compared."""
    folder = tmp_path_factory.mktemp("pages")
    one = fake_run(folder / HOSTILE.replace("/", "_")[:60], steps=400)
    two = fake_run(folder / "long", prompts=("a red circle", "x" * 1_000_000), ema=False)
    write_metrics(two, metrics(100_000))
    measured = (json.dumps(row) + "\n" for row in validation_rows(100_000, ema=False))
    (two / "validation.jsonl").write_text("".join(measured), encoding="utf-8")
    return {
        "run": report.write(one),
        "long": report.write(two),
        "compared": compare.write([one, two], folder / "compare.html"),
    }


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["run", "long", "compared"])
def test_in_a_browser(browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    seen = browser.look(pages[name], width, dark)
    assert seen.console == []
    assert seen.requests == []
    assert seen.pale == []
    assert seen.overflow <= 0
    assert seen.broken == 0


@needs_browser
def test_the_keyboard_alone_reads_a_curve_and_compares_pictures(browser: Browser, pages: dict[str, Path]) -> None:
    browser.look(pages["run"], 1440)

    def run(expression: str) -> Any:
        return browser.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            told = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "text": "\r" * (key == "Enter")}
            browser.send("Input.dispatchKeyEvent", type=kind, **told)

    run('document.querySelector(".chart.lines").focus()')
    press("Home")
    assert run('document.querySelector(".chart.lines output").textContent').startswith("step 0: held-out pictures")
    press("ArrowRight")
    assert run('document.querySelector(".chart.lines output").textContent').startswith("step 50: ")
    run('document.querySelector(".scale").focus()')
    press("Enter")
    shown = (
        "[...document.querySelectorAll('.plot')].filter((plot) => plot.checkVisibility()).map((plot) => plot.className)"
    )
    assert run(shown) == ["plot logarithmic"] * 3 + ["plot"] * 4, "all charts of losses have the other axis"
    assert run('document.querySelector(".scale").ariaPressed') == "true"
    run('document.getElementById("steps").focus()')
    press("Home")
    assert run('document.querySelector(".steps output").textContent') == "step 0"
    assert run('document.querySelector(".wipe img.after").alt').startswith("step 0, ")


KEYS = {"Enter": 13, "Home": 36, "ArrowRight": 39}


def test_a_long_run_s_page_stays_small(pages: dict[str, Path]) -> None:
    assert pages["long"].stat().st_size < 5_000_000
