"""The studio as people use it: in headless Chromium, from choosing a folder to trying prompts on what was trained.

Whatever the page does is watched: nothing on the console, no request that leaves the machine, nothing wider than the
window. Set STUDIO_PICTURES to a folder to keep screenshots.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.studio.test_actions import HOSTILE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
KEPT = os.environ.get("STUDIO_PICTURES")
LONG = 240_000  # milliseconds that a command may take on a busy machine
WIDTHS = {"wide": 1440, "narrow": 390}
# Contrast of text with what is behind it (WCAG 2.2, 1.4.3), for every element that holds text and is seen.
CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")

UNNAMED = """[...document.querySelectorAll("input, select, textarea, button, a, img")]
    .filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.alt || e.querySelector("img[alt]")))
    .map(e => e.outerHTML)"""
DOUBLED = """[...document.querySelectorAll("[id]")].map(e => e.id).filter((id, i, all) => all.indexOf(id) < i)"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with six toy pictures in `toys`."""
    import toyworld

    toyworld.write_folder(tmp_path / "toys", 6, 7, holdout=None, count=1, size=(128, 192), terse=0.0)
    return tmp_path


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    """The address that `sdxl ui` prints."""
    command = [sys.executable, "-m", "sdxl_trainer", "ui", "--no-open", "--port", "0", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = process.stdout.readline() + process.stdout.readline()
        yield re.findall(r"http://\S+", said)[0]
        process.terminate()


@pytest.fixture
def window(address: str) -> Iterator[Callable[..., Any]]:
    """Opens the studio in a window of its own; what goes wrong in any of them fails the test at its end."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []

    def watch(page: Any) -> None:
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: None if own(request.url) else wrong.append(f"left: {request.url}"))

    def own(url: str) -> bool:
        return url.startswith((address.split("?")[0], "data:", "blob:"))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(width: int = 1440, dark: bool = False) -> Any:
            scheme: Any = "dark" if dark else "light"
            page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
            watch(page)
            page.goto(address)
            page.locator("h1").wait_for()
            return page

        yield open_page
        browser.close()
    assert wrong == []


def go(page: Any, name: str) -> None:
    page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()
    page.get_by_role("heading", level=1, name=name, exact=True).wait_for()


def looks_right(page: Any, name: str) -> None:
    """Nothing is wider than the window, every text can be read, every field has a name."""
    if KEPT:
        Path(KEPT).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{KEPT}/{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
    assert page.evaluate(CONTRAST) == [], name
    assert page.evaluate(UNNAMED) == [], name
    assert page.evaluate(DOUBLED) == [], name


def test_a_whole_job(window: Callable[..., Any], home: Path) -> None:
    page = window()
    captions(page, home)
    settings(page, home)
    training(page)
    go(page, "Try")
    page.get_by_label("Prompts, one a line").fill(f"a red circle\n{HOSTILE}")
    page.get_by_label("Steps").fill("2")
    page.get_by_role("button", name="Draw").click()
    page.locator(".prompt td img").nth(3).wait_for(timeout=LONG)
    looks_right(page, "try")
    assert page.locator("script").count() == 2, "nothing of a caption or prompt became markup"
    assert page.locator("img[src=x]").count() == 0
    assert page.locator(".trial td bdi").all_text_contents() == ["a red circle", HOSTILE], (
        "its mark that turns text around ends with it"
    )


def captions(page: Any, home: Path) -> None:
    """A folder is chosen, a caption is changed, and the change is taken back."""
    file = home / "toys" / "metadata.jsonl"
    page.get_by_label("Folder on this machine").fill("toys")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("6 pictures, 6 captions").wait_for()
    first, second = (page.get_by_label(f"Caption of 00000{i}.png") for i in (0, 1))
    first.fill(HOSTILE)
    first.press("Enter")
    page.get_by_text("saved", exact=True).wait_for()
    assert second.evaluate("box => box === document.activeElement"), "Enter goes on to the next caption"
    assert "alert" in file.read_text(encoding="utf-8")
    looks_right(page, "pictures")
    page.get_by_role("button", name="Take back").click()
    page.get_by_text("taken back").wait_for()
    assert "alert" not in file.read_text(encoding="utf-8")


def settings(page: Any, home: Path) -> None:
    """A config is made of a preset, changed as a form and as text, and checked."""
    go(page, "Settings")
    page.get_by_label("micro-SDXL").check()
    page.get_by_label("Name of the run").fill("toy")
    looks_right(page, "new")
    page.get_by_role("button", name="Make the config").click()
    for key, value in {"steps": "120", "checkpoint_every": "1 epoch", "validate_every": "", "batch_size": "2"}.items():
        field = page.locator(f"#usual-train-{key}")
        field.fill(value)
        field.press("Tab")
        saved(page)
    page.get_by_text("As text", exact=True).click()
    area = page.get_by_label("Config as TOML")
    area.fill(area.input_value().replace("[validation]", "[validation]\nsteps = 2"))
    page.get_by_role("button", name="Save the text").click()
    saved(page)
    looks_right(page, "settings")
    tree = tomllib.loads((home / "runs" / "toy.toml").read_text(encoding="utf-8"))
    assert (tree["train"]["steps"], tree["validation"]["steps"]) == (120, 2)
    assert tree["train"]["checkpoint_every"] == "1 epoch"
    assert "validate_every" not in tree["train"]
    page.locator("summary", has_text="by section").click()
    page.locator("summary", has_text="[train]").click()
    field = page.locator("#option-train-micro_batch")
    field.fill("9")
    field.press("Tab")
    fix = page.get_by_role("button", name="Set train.micro_batch = 2")
    fix.wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()
    looks_right(page, "problem")
    fix.click()
    page.locator(".problem").wait_for(state="detached")
    page.get_by_label("Find an option").fill("gamma")
    assert page.locator("#option-objective-snr_gamma").is_visible()
    assert not page.locator("#option-train-micro_batch").is_visible()
    picture = home / "toys" / "000001.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"<!DOCTYPE html>")
    check, start = (page.get_by_role("button", name=name, exact=True) for name in ("Check", "Start"))
    check.click()
    page.locator(".problem", has_text="000001.png").wait_for(timeout=LONG)
    assert start.is_disabled()
    picture.write_bytes(whole)
    check.click()
    page.get_by_text("Nothing stops it.").wait_for(timeout=LONG)
    assert start.is_enabled()
    page.get_by_role("heading", name="What the model sees").wait_for(timeout=LONG)
    looks_right(page, "check")


def saved(page: Any) -> None:
    page.get_by_text("saved", exact=True).wait_for()
    page.locator("#said").evaluate("place => (place.textContent = '')")


def training(page: Any) -> None:
    """It is started, stopped and continued, with numbers and pictures as they come."""
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator(".state", has_text=re.compile(r"step \d")).wait_for(timeout=LONG)
    page.locator(".chart.loss").wait_for(timeout=LONG)
    page.get_by_role("button", name="Pictures now").click()
    page.get_by_text(re.compile("the validation pictures are drawn after the step")).wait_for()
    page.get_by_role("button", name="Save now").click()
    page.get_by_text("a checkpoint is saved after the step that is running (sdxl now runs/toy save)").wait_for()
    looks_right(page, "running")
    page.get_by_role("button", name="Pause").click()
    page.locator(".state .chip", has_text=re.compile("^paused$")).wait_for(timeout=LONG)
    looks_right(page, "paused")
    page.get_by_role("button", name="Go on").click()
    page.locator(".state .chip", has_text="running").wait_for(timeout=LONG)
    page.locator("figure img, .prompt img").first.wait_for(timeout=LONG)
    page.get_by_role("button", name="Save and stop").click()
    page.get_by_role("button", name="Continue").wait_for(timeout=LONG)
    page.locator(".chip", has_text="stopped").wait_for()
    looks_right(page, "stopped")
    page.get_by_role("button", name="Continue").click()
    page.locator(".state", has_text="step 120 of 120").wait_for(timeout=LONG)
    page.locator(".state .chip.good").wait_for(timeout=LONG)
    page.get_by_role("link", name="pytorch_lora_weights.safetensors").wait_for(timeout=LONG)
    page.get_by_role("button", name="log axis").first.click()
    assert page.locator(".plot.logarithmic").first.is_visible()
    page.get_by_text("To the Hugging Face hub").click()
    page.get_by_text("sdxl push runs/toy --private").wait_for()
    looks_right(page, "done")


def test_every_page_is_usable_at_every_width(window: Callable[..., Any], home: Path) -> None:
    from tests.fake_runs import fake_run

    for name in ("one", "two"):
        fake_run(home / "runs" / name, ema=False)
    for (wide, width), dark in itertools.product(WIDTHS.items(), (False, True)):
        page = window(width, dark)
        shown = f"{wide}-{'dark' if dark else 'light'}"
        page.get_by_label("Folder on this machine").fill("toys")
        page.keyboard.press("Enter")
        page.locator(".card").first.wait_for()
        page.get_by_text("Change all captions").click()
        looks_right(page, f"pictures-{shown}")
        page.get_by_title("See and move the crop").first.click()
        page.get_by_role("dialog").wait_for()
        looks_right(page, f"crop-{shown}")
        page.keyboard.press("Escape")
        for name in ("Settings", "Training", "Try", "Compare"):
            go(page, name)
            if name in {"Training", "Compare"}:
                page.locator(".chart").first.wait_for()
            if name == "Training":
                page.locator(".pick").nth(1).click()
                page.get_by_text("How it was drawn: step 100, seed 0").wait_for()
                page.get_by_role("button", name="log axis").first.click()
            looks_right(page, f"{name}-{shown}")
        assert page.get_by_text("2 runs compared").is_visible()
        page.close()


def test_the_keyboard_alone_is_enough(window: Callable[..., Any], home: Path) -> None:
    page = window()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.get_by_label("Folder on this machine").focus()
    page.keyboard.type("toys")
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()
    page.locator('.card[tabindex="0"]').focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.name") == "000001.png"
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("words from the keyboard")
    page.keyboard.press("Enter")
    page.get_by_text("saved", exact=True).wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.name") == "000002.png"
    page.keyboard.press("Control+z")
    page.get_by_text("taken back").wait_for()
    assert "keyboard" not in (home / "toys" / "metadata.jsonl").read_text(encoding="utf-8")

    page.get_by_title("See and move the crop").first.focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.get_by_role("application").focus()
    page.keyboard.press("ArrowRight")
    page.locator(".point:not([hidden])").wait_for()
    assert '"focus": [0.54' in (home / "toys" / "metadata.jsonl").read_text(encoding="utf-8")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
