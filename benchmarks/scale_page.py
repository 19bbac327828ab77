"""docs/scale.md and its picture, from results/scale.json: what was measured, and what follows from it by calculation.

python benchmarks/scale_page.py
"""

import json
import math
from pathlib import Path
from typing import Any

import common

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "images" / "scale.svg"
UNET = 2_567_463_684  # parameters of SDXL's UNet
TINY = 1_721_700  # of the UNet that scale.py trains
SIDE = 128  # latent cells of a picture of 1024 px
TEXT = 77 * (768 + 1280) + 1280  # numbers of a caption's embedding
BILLION = 10**9
NAMES = {"facts": "pictures' hashes and sizes", "index": "index of the cache", "records": "captions and places"}
LINES = {
    "first_step": "first step, warm cache",
    "check": "sdxl check",
    "first_look": "first look at every picture",
    "peak_rss": "all",
    "peak_anonymous": "anonymous",
    "peak_file": "pages of files",
    "step_cpu": "of the processor",
}
# What a cluster is taken to have where nothing was measured.
GPUS, PER_NODE, LINK, RATE, SAMPLES = 1000, 8, 50e9, 200e6, 5.0


def size(value: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def span(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.3g} s"


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """What one more sample adds, between the smallest and the largest set."""
    return (rows[-1][name] - rows[0][name]) / (rows[-1]["samples"] - rows[0]["samples"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    made = [
        "| samples | first step, seconds | of the processor | a step, ms of the processor | memory at most | "
        "anonymous | pages of files | check, seconds | first look, seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        check = f"{row['check']:.1f}" if "check" in row else "not measured"
        made.append(
            f"| {row['samples']:,} | {row['first_step']:.1f} | {row['first_step_cpu']:.1f} | "
            f"{1e3 * row['step_cpu']:.1f} | {size(row['peak_rss'])} | {size(row['peak_anonymous'])} | "
            f"{size(row['peak_file'])} | {check} | {row['first_look'] + row['list_of_missing']:.1f} |"
        )
    return made


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    last = rows[-1]
    steps, spread = [row["step_cpu"] for row in rows], max(row["step_cpu_spread"] for row in rows)
    return [
        f"- From {rows[0]['samples']:,} to {last['samples']:,} samples the memory at most grows by "
        f"{slope(rows, 'peak_rss'):.0f} bytes a sample: {slope(rows, 'peak_anonymous'):.0f} anonymous, "
        f"{slope(rows, 'peak_file'):.0f} pages of files (each at its own highest moment).",
        f"- The first step comes after {rows[0]['first_step']:.1f} s with {rows[0]['samples']:,} samples and after "
        f"{last['first_step']:.1f} s with {last['samples']:,}, counted from the start of the process.",
        f"- A step takes {1e3 * min(steps):.1f} to {1e3 * max(steps):.1f} ms of the processor over all sizes; the "
        f"quartiles of the steps of one run are up to {1e3 * spread:.1f} ms apart.",
    ]


def at_a_billion(rows: list[dict[str, Any]]) -> list[str]:
    memory, start = slope(rows, "peak_anonymous"), slope(rows, "first_step_cpu")
    look = (slope(rows, "first_look") + slope(rows, "list_of_missing")) * BILLION
    last = rows[-1]
    files = {name: value / last["samples"] for name, value in last["files"].items()}
    latent, text = 2 * 8 * SIDE * SIDE, 2 * TEXT
    fit = 16e9 / memory
    made = [
        "## A billion pictures",
        "",
        "Calculated from the growth of the table above; nothing of this size was run.",
        "",
        "| what | a sample | a billion |",
        "| --- | --- | --- |",
        f"| anonymous memory of each process | {memory:.0f} bytes | {size(memory * BILLION)} |",
        f"| start to the first step, warm cache | {1e6 * start:.2g} µs | {span(start * BILLION)} |",
        f"| first look (hash and header of each picture) and list of what is missing | {look / BILLION * 1e6:.0f} µs | "
        f"{span(look)} |",
        *(
            f"| {NAMES[name]} on the disk | {value:.0f} bytes | {size(value * BILLION)} |"
            for name, value in files.items()
        ),
        f"| latents, 1024 px, fp16 mean and deviation | {size(latent)} | {size(latent * BILLION)} |",
        f"| embeddings of a caption of 75 tokens, 16 bits | {size(text)} | {size(text * BILLION)} |",
        "",
        f"What gives first is memory: with 16 GB for each process a run holds {fit / 1e6:,.0f} million samples. "
        f"A billion at once would need {size(memory * BILLION)} in every process, and {PER_NODE} processes on a node "
        f"{size(PER_NODE * memory * BILLION)}: that is not possible on ordinary nodes today. A set of a billion is "
        f"trained in {math.ceil(BILLION / fit)} parts or more, one after another (`model.path` of the next run is the "
        "output of the one before), each with a cache of its own.",
        "",
        f"Second is the disk: {size((latent + text) * BILLION)} of cache. Latents have to be encoded by many processes "
        f"side by side: at {SAMPLES:g} pictures a second each (assumed), {GPUS:,} GPUs take "
        f"{span(BILLION / (GPUS * SAMPLES))}.",
        "",
        "Step time does not depend on the number of samples: a look-up is a search in a sorted table.",
    ]
    return made


def at_a_thousand_gpus(rows: list[dict[str, Any]]) -> list[str]:
    each = rows[-1]["checkpoint"] / TINY
    row = 2 * 8 * SIDE * SIDE + 2 * TEXT
    moved = 2 * (GPUS - 1) / GPUS * 2 * UNET
    second, memory = GPUS * SAMPLES, slope(rows, "peak_anonymous") * 1e8
    return [
        "## A thousand GPUs",
        "",
        f"Nothing was run on {GPUS:,} GPUs. Measured here: the bytes of a checkpoint for each parameter, the rows' "
        "sizes, the equality of losses over processes ([exactness.md](exactness.md)). Assumed: "
        f"{size(LINK)} a second between GPUs of different nodes, {size(RATE)} a second from the storage to each node, "
        f"{SAMPLES:g} pictures a second and GPU at 1024 px. Calculated: the rest.",
        "",
        "| what | figure | how |",
        "| --- | --- | --- |",
        f"| a checkpoint, full fine-tune, fp32 with AdamW | {size(each * UNET)} | "
        f"measured {each:.2f} bytes a parameter ({TINY:,} parameters) x {UNET:,} |",
        f"| written by one process at {size(RATE)} a second | {span(each * UNET / RATE)} | beside the training |",
        f"| gradients that each GPU sends in a step | {size(moved)} | "
        f"2 (N - 1) / N x {UNET:,} x 2 bytes (ring, bf16) |",
        f"| time for that | {span(moved / LINK)} | if nothing of it is hidden behind the backward pass |",
        f"| pictures a second | {second:,.0f} | {GPUS:,} x {SAMPLES:g} |",
        f"| cached rows read a second | {size(second * row)}, {size(PER_NODE * SAMPLES * row)} a node | x {size(row)} "
        f"a sample: {PER_NODE * SAMPLES * row / RATE:.0%} of what the node's storage is taken to give |",
        f"| an epoch of 100 million pictures | {span(1e8 / second)} | |",
        f"| every process's memory for them | {size(memory)} | measured growth x 100 million |",
        f"| of a node with {PER_NODE} processes | {size(PER_NODE * memory)} | "
        "each process holds the numbers of all samples: nothing is shared between processes |",
        "",
        "The batch: one picture for each GPU is already a batch of 1,000, and micro-batches of 4 make it 4,000. "
        "The order of samples is a function of seed, epoch and step, so that no process has to ask another, and a "
        "node that is lost costs the steps since the last checkpoint.",
    ]


def page(found: dict[str, Any]) -> str:
    rows, facts = found["rows"], found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        "\n".join(
            [
                "# Growth",
                "",
                "Made by `python benchmarks/scale_page.py` from what `python benchmarks/scale.py` measured: "
                f"{facts['processor']}, {facts['cores']} cores, load {facts['load']:.1f}; {versions}.",
                "",
                f"Each size is a parquet data set with a full cache and a tiny UNet ({TINY:,} parameters): what is "
                f"seen is the cost of the data alone. Medians of {found['repeats']} runs of {found['steps']} steps "
                "of 4.",
                "",
                *table(rows),
                "",
                *verdicts(rows),
                "",
                "![What grows with the number of samples](images/scale.svg)",
                "",
                *at_a_billion(rows),
                "",
                *at_a_thousand_gpus(rows),
            ]
        )
        + "\n"
    )


def panel(rows: list[dict[str, Any]], left: int, title: str, lines: dict[str, tuple[str, float]]) -> list[str]:
    """Values over samples, both on scales of powers of ten. `lines`: (colour, factor) by the name of a column."""
    width, height, top = 240, 190, 40
    values = [row[name] * factor for name, (_, factor) in lines.items() for row in rows if name in row]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    first, last = math.log10(rows[0]["samples"]), math.log10(rows[-1]["samples"])

    def at(samples: float, value: float) -> tuple[float, float]:
        x = (math.log10(samples) - first) / max(last - first, 1)
        return left + width * x, top + height * (1 - (math.log10(value) - low) / max(high - low, 1))

    parts = [f'<text x="{left}" y="24" font-weight="bold">{title}</text>']
    for power in range(low, high + 1):
        y = at(rows[0]["samples"], 10.0**power)[1]
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{10.0**power:g}</text>')
    for row in rows:
        x = at(row["samples"], 10.0**low)[0]
        text = f"{row['samples'] // 10**6} M" if row["samples"] >= 10**6 else f"{row['samples'] // 1000} k"
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle" fill="#555">{text}</text>')
    for number, (name, (colour, factor)) in enumerate(lines.items()):
        points = [at(row["samples"], row[name] * factor) for row in rows if name in row]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = top + height + 40 + 18 * number
        parts.append(f'<text x="{left}" y="{y}" fill="{colour}">{LINES[name]}</text>')
    return parts


def picture(rows: list[dict[str, Any]]) -> str:
    blue, red, green = "#2f6f9f", "#b5452c", "#3b7d3b"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 330" font-family="sans-serif" font-size="13">',
        '<rect width="940" height="330" fill="#fff"/>',
        *panel(rows, 60, "seconds", {"first_step": (blue, 1), "check": (red, 1), "first_look": (green, 1)}),
        *panel(
            rows,
            370,
            "MB at most",
            {"peak_rss": (blue, 1e-6), "peak_anonymous": (red, 1e-6), "peak_file": (green, 1e-6)},
        ),
        *panel(rows, 680, "ms of a step", {"step_cpu": (blue, 1e3)}),
        '<text x="470" y="322" text-anchor="middle" fill="#555">samples</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    found = json.loads((common.RESULTS / "scale.json").read_text(encoding="utf-8"))
    (DOCS / "scale.md").write_text(page(found), encoding="utf-8")
    PICTURE.write_text(picture(found["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()
