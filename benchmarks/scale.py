"""What a large data set costs: time to the first step with a warm cache, memory, time per step, time of a check.

Each size is a table of so many rows in parquet, with a picture of a few bytes and a caption each; all pictures are of
one shape. Their latents and embeddings are tiny and lie in shards as the trainer writes them: of the rows everything is
real but the contents. Each run is a process of its own, so that its peak memory is its own: of its own data
(anonymous), and of pages of files that it looks at (file), which the system can take back at any time. Seconds are told
as the clock has them and, where the name ends in _cpu, as the processor worked: those depend little on what else runs.

python benchmarks/scale.py --sizes 1000 10000 100000 1000000
python benchmarks/scale_page.py
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import numpy as np
from PIL import Image

ROWS = 50_000  # of a parquet file, and of a shard
SIDE = 64
STEPS = 40


def pictures(first: int, last: int) -> list[bytes]:
    """Pictures of a few hundred bytes that all differ: one JPEG with a number in a comment."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (90, 120, 200)).save(file, "JPEG", quality=30)
    whole = file.getvalue()
    # After the start of image: a comment segment of four bytes.
    return [whole[:2] + b"\xff\xfe\x00\x06" + n.to_bytes(4, "big") + whole[2:] for n in range(first, last)]


def caption(number: int) -> str:
    return f"a photo of thing {number}, in a place with light and colour, sharp"


def table(folder: Path, count: int) -> None:
    """The data set: parquet files with pictures and captions."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    schema = pyarrow.schema([("image", kind), ("text", pyarrow.string())], {"huggingface": json.dumps(features)})
    for first in range(0, count, ROWS):
        last = min(first + ROWS, count)
        images = [{"bytes": content, "path": None} for content in pictures(first, last)]
        columns = {"image": images, "text": [caption(n) for n in range(first, last)]}
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pydict(columns, schema), folder / f"train-{first // ROWS:05d}.parquet"
        )


def settings(place: Path) -> dict[str, Any]:
    return {
        "output_dir": str(place / "run"),
        "model": {"path": str(place / "base")},
        "data": [{"path": str(place / "data"), "resolution": SIDE}],
        "cache": {"path": str(place / "cache"), "datasets_dir": str(place / "datasets"), "workers": 0},
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-4, "checkpoint_every": STEPS, "workers": 1},
    }


def prepare(place: Path, count: int) -> dict[str, float]:
    """Data, a tiny base, and the cache: real facts and keys, rows made up. Gives what the first look costs."""
    import torch

    from sdxl_trainer import base as bases
    from sdxl_trainer.blueprint import build
    from sdxl_trainer.configfile import validated
    from sdxl_trainer.data import cache, prepare

    table(place / "data", count)
    build(place / "base", "tiny", captions=[caption(n) for n in range(50)])
    config = validated(settings(place), "scale")
    base = bases.resolve(config.model, place / "cache")
    began = time.perf_counter()
    stock = prepare.take_stock(config, base, "fp32")
    first_look = time.perf_counter() - began
    began = time.perf_counter()
    missing = stock.missing_latents()
    prompts = stock.missing_texts()
    listed = time.perf_counter() - began
    latents, texts = cache.Writer(stock.latents), cache.Writer(stock.texts)
    row = torch.full((8, SIDE // 8, SIDE // 8), 0.5).half()
    for number, (picture, geometry) in enumerate(missing, start=1):
        latents.rows[stock.keys.latent(picture, geometry)] = row.clone()
        if number % ROWS == 0:
            cache.write_shard(stock.latents.folder, latents.rows, {})
            latents.rows.clear()
    latents.flush()
    width = sum(base.config(part)["hidden_size"] for part in ("text_encoder", "text_encoder_2"))
    states, pooled = torch.zeros(1, width), torch.zeros(base.config("text_encoder_2")["projection_dim"])
    for number, prompt in enumerate(prompts, start=1):
        name = stock.keys.text_row(prompt)
        texts.rows |= {f"{name}.states": states.clone(), f"{name}.pooled": pooled.clone()}
        if number % ROWS == 0:
            cache.write_shard(stock.texts.folder, texts.rows, {})
            texts.rows.clear()
    texts.flush()
    for store in (stock.latents, stock.texts):
        store.refresh().save()
    stock.settle()
    return {"first_look": first_look, "list_of_missing": listed}


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory."""
    return {name: common.status_bytes(name) for name in ("RssAnon", "RssFile")}


class Peaks(threading.Thread):
    """The most that is in memory, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = resident()

    def run(self) -> None:
        while True:
            self.most = {name: max(value, self.most[name]) for name, value in resident().items()}
            time.sleep(0.01)


def run(place: Path) -> dict[str, float]:
    """A run of some steps with everything cached, timed from the start of the process."""
    began = float(sys.argv[-1])
    from sdxl_trainer import train
    from sdxl_trainer.configfile import validated

    imported = time.time()
    peaks = Peaks()
    peaks.start()
    times: list[float] = []
    spent: list[float] = []
    step = train.train_step

    def timed(*arguments: Any) -> Any:
        result = step(*arguments)
        times.append(time.time())
        spent.append(time.process_time())
        return result

    train.train_step = timed  # type: ignore[assignment]
    output = train.train(validated(settings(place), "scale"))
    saved = sum(path.stat().st_size for path in (output / f"checkpoint-{STEPS}").rglob("*") if path.is_file())
    laps = [b - a for a, b in pairwise(spent[9:])]
    return {
        "first_step": times[0] - began,
        "first_step_cpu": spent[0],
        "imports": imported - began,
        "step_cpu": statistics.median(laps),
        "step_cpu_spread": float(np.subtract(*np.percentile(laps, [75, 25]))),
        "peak_rss": common.status_bytes("VmHWM"),
        "peak_anonymous": peaks.most["RssAnon"],
        "peak_file": peaks.most["RssFile"],
        "checkpoint": saved,
    }


def check(place: Path) -> dict[str, float]:
    began = time.perf_counter()
    from sdxl_trainer import check as checks
    from sdxl_trainer.configfile import validated

    checks.run(validated(settings(place), "scale"))
    return {"check": time.perf_counter() - began, "check_cpu": time.process_time()}


def measured(place: Path, count: int, repeats: int, without_check: bool) -> dict[str, Any]:
    """All figures of one size."""
    shutil.rmtree(place, ignore_errors=True)
    found: dict[str, Any] = {"samples": count, **child("prepare", place, count)}
    runs = []
    for _ in range(repeats):
        runs.append(child("run", place))
        shutil.rmtree(place / "run", ignore_errors=True)
    for name in runs[0]:
        found[name] = statistics.median(row[name] for row in runs)
    if not without_check:
        found |= child("check", place)
    kinds = {"pictures.table": "facts", ".index": "index", ".table": "records", ".rows": "records"}
    sizes = dict.fromkeys(kinds.values(), 0)
    for path in (place / "cache").rglob("*"):
        kind = kinds.get(path.name) or kinds.get(path.suffix)
        if kind:
            sizes[kind] += path.stat().st_size
    return {**found, "files": sizes}


def child(what: str, place: Path, count: int = 0) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--place", str(place), "--sizes", str(count)]
    done = subprocess.run([*command, "--", str(time.time())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--place", type=Path, default=Path("scale-benchmark"))
    parser.add_argument("--without-check", action="store_true", help="on a busy machine")
    parser.add_argument("--child")
    parser.add_argument("began", nargs="?")
    options = parser.parse_args()
    if options.child:
        made = {"prepare": lambda: prepare(options.place, options.sizes[0]), "run": lambda: run(options.place)}
        made["check"] = lambda: check(options.place)
        print(json.dumps(made[options.child]()))
        return
    rows = []
    for count in options.sizes:
        rows.append(measured(options.place, count, options.repeats, options.without_check))
        print(json.dumps(rows[-1]), flush=True)
        common.write("scale", {"rows": rows, "steps": STEPS, "repeats": options.repeats})
    shutil.rmtree(options.place)


if __name__ == "__main__":
    main()
