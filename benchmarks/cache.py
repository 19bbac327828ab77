"""What the cache costs: rows read per second, and how much of the VAE's throughput remains when the cache is filled.

Rows are of pictures of 1024 px: fp16 [8, 128, 128], 256 KiB. They are read in an order that is drawn, from shards as
the trainer writes them, which the system has in its memory. Reading is timed in seconds of the processor, which do not
depend on what else the machine does. Filling is timed by the clock, alternating with the VAE alone on the same pixels
in memory, and means little on a busy machine.

python benchmarks/cache.py --pictures FOLDER --resolution 512
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from diffusers import AutoencoderKL

from sdxl_trainer import base as bases
from sdxl_trainer.configfile import validated
from sdxl_trainer.data import cache, encode, prepare
from sdxl_trainer.demo import BASE


def reads(rows: int, repeats: int) -> dict[str, Any]:
    """Rows per second of one core, drawn in no order."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = cache.open_store(Path(folder) / "latents")
        writer = cache.Writer(store)
        for number in range(rows):
            writer.add(cache.key("row", number), torch.full((8, 128, 128), 0.5).half())
        writer.flush()
        names = [cache.key("row", number) for number in range(rows)]
        found = []
        for _ in range(repeats):
            order = draw.integers(0, rows, 2000)
            began = time.process_time()
            for number in order:
                store.get(names[number])
            found.append(len(order) / (time.process_time() - began))
    spread = float(np.subtract(*np.percentile(found, [75, 25])))
    return {"rows": rows, "bytes": 2 * 8 * 128 * 128, "rows_per_cpu_second": statistics.median(found), "spread": spread}


def fills(pictures: Path, resolution: int, repeats: int) -> dict[str, Any]:
    """Pictures per second: the VAE alone on pixels in memory, and a fill from files, in turns; which comes first
    alternates. A fill begins with loading the VAE and starting workers: `share` leaves that out, by counting from its
    first batch to its last, `share_of_all` does not."""
    found: dict[str, list[float]] = {"alone": [], "filled": [], "filled_with_start": []}
    for number in range(repeats):
        place = Path(tempfile.mkdtemp())
        tree = {
            "output_dir": str(place / "run"),
            "model": {"path": str(BASE)},
            "data": [{"path": str(pictures), "resolution": resolution, "caption": "a photo", "caption_only": True}],
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
        }
        config = validated(tree, "benchmark")
        base = bases.resolve(config.model, place)
        stock = prepare.take_stock(config, base, "fp32")
        work, size = stock.missing_latents(), config.cache.batch_size
        pixels = [item for item in encode.decoded(work, config.cache) if isinstance(item, encode.Decoded)]
        vae = AutoencoderKL.from_pretrained(base.vae).eval().requires_grad_(False)

        def alone(pixels: list[encode.Decoded] = pixels, vae: Any = vae, size: int = size) -> None:
            parts = [np.stack([item.pixels for item in pixels[i : i + size]]) for i in range(0, len(pixels), size)]
            encode.moments(vae, encode.scaled(parts[0], torch.device("cpu"), vae.dtype))
            began = time.perf_counter()
            for part in parts:
                encode.moments(vae, encode.scaled(part, torch.device("cpu"), vae.dtype))
            found["alone"].append(len(pixels) / (time.perf_counter() - began))

        def fill(stock: Any = stock, config: Any = config, base: Any = base, work: Any = work) -> None:
            seen: list[tuple[int, float]] = []
            began = time.perf_counter()

            def progress(done: int, *_: Any) -> None:
                seen.append((done, time.perf_counter()))

            items, device = encode.decoded(work, config.cache), torch.device("cpu")
            encode.fill_latents(base, config.cache, stock.latents, stock.keys, len(work), items, device, progress)
            (first, start), (last, end) = seen[0], (len(work), time.perf_counter())
            found["filled"].append((last - first) / (end - start))
            found["filled_with_start"].append(len(work) / (end - began))

        for turn in (alone, fill) if number % 2 else (fill, alone):
            turn()
        shutil.rmtree(place)
    shares = [b / a for a, b in zip(found["alone"], found["filled"], strict=True)]
    whole = [b / a for a, b in zip(found["alone"], found["filled_with_start"], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    told = {"share": middle, "share_quartiles": [low, high], "share_of_all": statistics.median(whole)}
    return {"pictures": len(work), "resolution": resolution, "batch": size, **found, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="folder to fill a cache from; without it only rows are read")
    parser.add_argument("--resolution", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"reads": reads(options.rows, options.repeats)}
    if options.pictures:
        result["fill"] = fills(options.pictures, options.resolution, options.repeats)
    common.write("cache", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
