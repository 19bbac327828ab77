"""docs/performance.md and its picture, from what the benchmarks wrote into results/. Nothing is typed by hand.

python benchmarks/page.py
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "images" / "performance.svg"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote; nothing if it was not run."""
    path = common.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


Row = tuple[str, str, str, str]


def compared(found: dict[str, Any], show: Callable[[float], str] = seconds) -> tuple[str, str, str]:
    """Medians of both, and their ratio with the quartiles of the rounds."""
    reference, ours = (statistics.median(found[who]) for who in ("reference", "ours"))
    low, high = found["times_faster"]["quartiles"]
    return show(reference), show(ours), f"{found['times_faster']['ratio']:.2f} × ({low:.2f} to {high:.2f})"


def rows() -> list[Row]:
    """One for each thing that both do."""
    peers, made = result("peers"), list[Row]()
    for key, label in (
        ("start", "start to first optimizer step, everything cached"),
        ("resume", "start to the step after a checkpoint"),
        ("pipeline", "a sample out of the input pipeline alone, shapes of 1024 px"),
        ("steps", "an optimizer step, tiny UNet, 256 px, batch 4"),
    ):
        if key in peers:
            made.append((label, *compared(peers[key])))
    if "steps" in peers:
        peaks = {who: statistics.median(values) for who, values in peers["steps"]["peak_bytes"].items()}
        made.append(("memory at most, 64 photographs at 256 px", *sizes(peaks)))
    if "caching" in peers:
        found = peers["caching"]
        count = found["pictures"]
        for key, label in (
            ("first", f"encoding {count} JPEGs of 1024 × 1280 at first, {found['resolution']} px"),
            ("again", "the same command again"),
            ("other_learning_rate", "with another learning rate"),
        ):
            pair = found["seconds"][key]
            made.append(
                (label, seconds(pair["reference"]), seconds(pair["ours"]), f"{found['times_faster'][key]:.3g} ×")
            )
        made.append((f"memory at most, those {count} pictures", *sizes(found["peak_bytes"])))
    return made


def sizes(pair: dict[str, float]) -> tuple[str, str, str]:
    return size(pair["reference"]), size(pair["ours"]), f"{pair['reference'] / pair['ours']:.2f} ×"


def unet_rows() -> list[str]:
    found = result("unet")
    made = []
    for kind in (kind for kind in ("fp32", "bf16") if kind in found):
        one = found[kind]
        low, high = one["speed"]["quartiles"]
        made.append(
            f"| {kind} | {seconds(one['library']['median'])} | {seconds(one['ours']['median'])} | "
            f"{one['speed']['ratio']:.2f} × ({low:.2f} to {high:.2f}) | {one['library_of_limit']:.0%} | "
            f"{one['of_limit']:.0%} |"
        )
    return made


def page() -> str:
    peers, unet, memory = result("peers"), result("unet"), result("memory")
    loop, saves = result("loop"), result("checkpoints")
    lines = [
        "# Performance",
        "",
        "Made by `python benchmarks/page.py` from `benchmarks/results/`; `make bench` measures again.",
        "",
    ]
    if peers:
        lines += ["## Against the reference script", "", *about(peers), ""]
        lines += ["| what | reference | ours | times |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in rows()]
        lines += ["", "![Times of the reference in units of ours](images/performance.svg)", ""]
    if unet:
        lines += ["## The UNet", "", *machine(unet), ""]
        lines.append(
            f"`{unet['command']}`: forward, backward and fused AdamW of `mid` (SDXL's graph, 106,694,404 parameters), "
            f"{unet['latent']} × {unet['latent']} latents, batch {unet['batch']}, the library's UNet and ours in turn. "
            "The limit is the time that the step's operations take at the speed of the fastest matrix product here."
        )
        lines += ["", "| type | library | ours | times | library, of the limit | ours, of the limit |"]
        lines += ["| --- | --- | --- | --- | --- | --- |", *unet_rows(), ""]
    if loop:
        low, high = loop["share_quartiles"]
        lines += [
            "## The loop",
            "",
            f"`{loop['command']}`: {loop['share']:.1%} of the loop's time is UNet, loss, backward pass ",
        ]
        lines[-1] += f"and optimizer (quartiles {low:.1%}, {high:.1%})."
        lines.append("")
    if saves:
        lines += ["## Checkpoints", "", f"`{saves['command']}`: the longest step around a save takes "]
        lines[-1] += f"{saves['around_a_save']:.2f} median steps, away from saves {saves['away']:.2f}."
        lines.append("")
    if memory:
        lines += ["## Memory: predicted and measured", "", *machine(memory), ""]
        lines.append(
            f"`{memory['command']}`: {memory['within_10_percent']} of {len(memory['rows'])} settings within 10 %."
        )
        lines += ["", "| setting | predicted | measured | off by |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {r['setting']} | {size(r['predicted'])} | {size(r['measured'])} | {r['off']:+.1%} |"
            for r in memory["rows"]
        ]
        lines.append("")
    lines += ["## On a GPU", "", *gpu()]
    return "\n".join(lines).rstrip() + "\n"


def about(peers: dict[str, Any]) -> list[str]:
    gate = peers.get("gate", {})
    text = [
        "`python benchmarks/peers.py --reference DIFFUSERS --data PHOTOS`: the unmodified",
        f"`train_text_to_image_sdxl.py` of a checkout of diffusers (SHA-256 {peers['script'][:12]}…) and ours run as",
        "processes of their own with one command line, in turn; medians, and in brackets the quartiles of the rounds.",
    ]
    if gate:
        text.append(
            f"First the reference's first {gate['steps']} steps are taken again by ours on the same tensors: "
            f"the losses are at most {gate['losses_apart']:.1g} apart."
        )
    return [*text, *machine(peers)]


def machine(found: dict[str, Any]) -> list[str]:
    facts = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    cores = f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load']:.1f}"
    return [f"{cores}; {versions}."]


def gpu() -> list[str]:
    found = result("gpu")
    if not found:
        return [
            "Not measured yet. `python benchmarks/gpu.py` measures full-size SDXL on one GPU in ten minutes:",
            "limits, attention kernels, full fine-tuning, adapters, low-memory settings, graphs, numerics.",
        ]
    made = ["| what | images/s | share of the measured limit | memory |", "| --- | --- | --- | --- |"]
    limit = found["limits"]["bf16 product"]["operations_per_second"]
    for part in ("full", "adapter", "low_memory", "faster"):
        for name, one in found.get(part, {}).items():
            if "images_per_second" in one:
                share = f"{one['operations_per_second'] / limit:.0%}" if "operations_per_second" in one else ""
                made.append(f"| {name} | {one['images_per_second']:.1f} | {share} | {size(one['peak_bytes'])} |")
    return [f"{found['device']['name']}.", "", *made]


def picture(bars: list[tuple[str, float]]) -> str:
    """Bars on a scale of powers of ten: how many times as long the reference takes."""
    import math

    high = max([10.0, *(value for _, value in bars)])
    scale = 420 / math.log10(high)
    height = 34 * len(bars) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" font-family="sans-serif" font-size="14">',
        f'<rect width="900" height="{height}" fill="#fff"/>',
    ]
    for power in range(int(math.log10(high)) + 1):
        x = 400 + scale * power
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="0" y2="{height - 24}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="middle" fill="#555">{10**power} ×</text>')
    for number, (label, value) in enumerate(bars):
        y, width = 34 * number + 6, max(scale * math.log10(max(value, 1.0)), 1.0)
        parts.append(f'<text x="390" y="{y + 16}" text-anchor="end" fill="#222">{label}</text>')
        parts.append(f'<rect x="400" y="{y}" width="{width:.0f}" height="22" fill="#2f6f9f"/>')
        parts.append(f'<text x="{406 + width:.0f}" y="{y + 16}" fill="#222">{value:.3g}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    (DOCS / "performance.md").write_text(page(), encoding="utf-8")
    bars = [(label, float(times.partition(" ")[0])) for label, _, _, times in rows()]
    unet = result("unet")
    bars += [(f"a step of the UNet alone, {k}", unet[k]["speed"]["ratio"]) for k in ("fp32", "bf16") if k in unet]
    if bars:
        PICTURE.write_text(picture(bars), encoding="utf-8")


if __name__ == "__main__":
    main()
