"""How large the page about a run of 100,000 steps is, how long it takes to write, and to open in Chromium.

    python benchmarks/report.py

Opening is from the request of the file to the end of `load`, as the browser itself times it: median of seven.
"""

import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from sdxl_trainer import report
from tests.browser import CHROMIUM, Browser

STEPS, PROMPTS, SEEDS, DRAWN, SIDE = 100_000, 4, 4, 21, 1024
TIME = "(() => { const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd - t.startTime; })()"


def made(folder: Path) -> Path:
    """A run with a measure every 500 steps and validation pictures, full of noise, every 5,000."""
    draw = random.Random(0)
    rows = []
    for step in range(1, STEPS + 1):
        loss = 0.05 + 0.25 * math.exp(-4 * step / STEPS) * draw.lognormvariate(0, 0.5)
        row = {"step": step, "epoch": step // 1000, "loss": loss, "learning_rate": 1e-4, "memory_gb": 10.0}
        rows.append(row | {"grad_norm": draw.lognormvariate(-1, 0.4), "samples_per_second": draw.gauss(4, 0.2)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    measures = [
        {
            "step": step,
            "set": kind,
            "weights": "raw",
            "loss": 0.1,
            "interval": 0.01,
            "timesteps": [125, 375, 625, 875],
            "by_timestep": [0.4, 0.2, 0.1, 0.05],
            "pictures": [draw.random() for _ in range(100)],
        }
        for step in range(0, STEPS + 1, 500)
        for kind in ("held_out", "trained")
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measures), encoding="utf-8")
    (folder / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "samples" / "noise.png")
    notes = [
        {
            "step": step,
            "file": f"{step}-{prompt}-{seed}.png",
            "prompt": f"prompt {prompt}",
            "seed": seed,
            "weights": "raw",
        }
        for step in range(0, STEPS + 1, STEPS // (DRAWN - 1))
        for prompt in range(PROMPTS)
        for seed in range(SEEDS)
    ]
    for note in notes:
        (folder / "samples" / str(note["file"])).hardlink_to(folder / "samples" / "noise.png")
    (folder / "samples" / "samples.jsonl").write_text("".join(json.dumps(n) + "\n" for n in notes), encoding="utf-8")
    (folder / "config.toml").write_text(f"[train]\nsteps = {STEPS}\n", encoding="utf-8")
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = made(Path(temporary))
        began = time.perf_counter()
        page = report.write(folder)
        print(f"written in {time.perf_counter() - began:.1f} s: {page.stat().st_size / 1e6:.2f} MB")
        if not CHROMIUM:
            print("no Chromium on this machine: opening is not timed")
            return
        browser, times = Browser(), []
        for _ in range(7):
            browser.look(page, 1440)
            times.append(browser.send("Runtime.evaluate", expression=TIME, returnByValue=True)["result"]["value"])
        browser.close()
        print(f"opened in {statistics.median(times):.0f} ms (from {min(times):.0f} to {max(times):.0f})")


if __name__ == "__main__":
    main()
