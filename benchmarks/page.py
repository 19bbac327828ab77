"""docs/performance.md and its picture, from what the benchmarks wrote into results/. Nothing is typed by hand.

python benchmarks/page.py
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "images" / "performance.svg"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote; nothing if it was not run."""
    path = common.RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def digits(value: float) -> str:
    """Three, and no power of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Target:
    """What a measure is to reach: at least, or at most, so much in `unit`; `found` is how it came out, None if it was
    not measured."""

    label: str
    found: float | None
    bound: float
    unit: str
    least: bool = False

    @property
    def row(self) -> str:
        side = "≥" if self.least else "≤"
        figure, answer = "not measured yet", ""
        if self.found is not None:
            met = self.found >= self.bound if self.least else self.found <= self.bound
            figure, answer = f"{digits(self.found)}{self.unit}", "yes" if met else "**no**"
        return f"| {self.label} | {figure} | {side} {self.bound:g}{self.unit} | {answer} |"


def targets() -> Iterator[Target]:
    """Of everything that was measured, in the order of a run."""
    peers, unet, loop, saves, memory = (result(n) for n in ("peers", "unet", "loop", "checkpoints", "memory"))
    of_reference, faster = " × the reference's time", " × as fast as the reference"
    if "start" in peers:
        found = 1 / peers["start"]["times_faster"]["ratio"]
        yield Target("start to the first optimizer step, everything cached", found, 0.35, of_reference)
    if "caching" in peers:
        count, times = peers["caching"]["pictures"], peers["caching"]["times_faster"]
        yield Target(f"encoding {count} JPEGs at first", times["first"], 5, faster, True)
        yield Target("the same again, nothing to encode", times["again"], 50, faster, True)
        yield Target(
            "again with another learning rate, nothing to encode", times["other_learning_rate"], 50, faster, True
        )
    if "pipeline" in peers:
        label = "input pipeline alone, rows at shapes of 1024 px"
        yield Target(label, peers["pipeline"]["times_faster"]["ratio"], 200, faster, True)
        if "times_faster_than_kohya" in peers["pipeline"]:
            found = peers["pipeline"]["times_faster_than_kohya"]["ratio"]
            yield Target("the same against kohya's data set", found, 10, " × as fast as kohya", True)
    if "steps" in peers:
        label = "a step of the tiny UNet, photographs at 256 px, batch 4"
        yield Target(label, peers["steps"]["times_faster"]["ratio"], 35, faster, True)
    if loop:
        label = "share of the loop's time that is UNet, loss, backward pass and optimizer"
        yield Target(label, loop["share"], 0.95, "", True)
    for kind in (kind for kind in ("fp32", "bf16") if kind in unet):
        label = f"a step of the `mid` UNet, {kind}"
        yield Target(label, unet[kind]["speed"]["ratio"], 1.25, " × as fast as the library's", True)
    for stage, found in peers.get("memory", {}).get("share", {}).items():
        yield Target(f"memory at most, {stage}", found, 0.5, " × the reference's")
    if "resume" in peers:
        label = "start to the step after a checkpoint"
        yield Target(label, 1 / peers["resume"]["times_faster"]["ratio"], 0.3, of_reference)
    if saves:
        yield Target("the longest step around a save", saves["around_a_save"], 1.2, " × the median step")
    if memory:
        furthest = max(abs(row["off"]) for row in memory["rows"])
        yield Target(f"memory predicted, furthest off of {len(memory['rows'])} settings", 100 * furthest, 10, " %")


def gpu_targets() -> Iterator[Target]:
    """Of full-size SDXL on one H200."""
    found = result("gpu")
    full, low, adapters = (found.get(part, {}) for part in ("full", "low_memory", "adapter"))

    def best(who: str, figure: str = "images_per_second") -> float | None:
        """The largest of all batches."""
        return max((row[figure] for name, row in full.items() if name.startswith(who) and figure in row), default=None)

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    for side, bound in ((1024, 24), (512, 100)):
        yield Target(f"full fine-tuning at {side} px", best(f"ours bf16, {side}"), bound, " images/s", True)
    limit = found.get("limits", {}).get("bf16 product", {}).get("operations_per_second")
    share = ratio(best("ours bf16", "operations_per_second"), limit)
    yield Target("the same, share of the fastest matrix product", share, 0.6, "", True)
    times = ratio(best("ours bf16, 1024"), best("reference, 1024"))
    yield Target("the same at 1024 px, against the reference's loop", times, 1.6, " × as fast", True)
    levels = [low.get(name, {}) for name in ("bf16, Adafactor, fused backward", "bf16, Adafactor")]
    least, speeds = levels[0].get("peak_bytes"), [level.get("images_per_second") for level in levels]
    label = "full fine-tuning at 1024 px, one picture, lowest level"
    yield Target(f"{label}: memory", least and least / 1e9, 7.5, " GB")
    yield Target(f"{label}: speed, of that of the next", ratio(*speeds), 0.65, "", True)
    lora = min((row["peak_bytes"] for row in adapters.values() if "peak_bytes" in row), default=None)
    yield Target("LoRA of rank 16 at 1024 px, one picture: memory", lora and lora / 1e9, 5, " GB")
    drifts = [row for row in found.get("drift", {}).values() if "levels" in row]
    apart = [level["apart"] for row in drifts for level in row["levels"].values()]
    steps = min((row["steps"] for row in drifts), default=500)
    label = f"losses after {steps} steps, low-memory levels and fp32 weights: furthest apart"
    yield Target(label, common.largest(apart) if apart else None, 1, " standard errors of fp32's mean")


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
        ("camera", "the same, photographs of 24 megapixels"),
    ):
        if key in peers:
            made.append((label, *compared(peers[key])))
        if key == "pipeline" and key in peers:
            noisy = statistics.median(peers[key]["ours_with_noise"])
            made.append(("the same with a step's noise, which the reference draws elsewhere", "", seconds(noisy), ""))
    if "caching" in peers:
        found = peers["caching"]
        count = found["pictures"]
        for key, label in (
            ("first", f"{count} JPEGs of 1024 × 1280 and their captions encoded, {found['resolution']} px"),
            ("again", "the same command again"),
            ("other_learning_rate", "with another learning rate"),
        ):
            pair = found["seconds"][key]
            made.append(
                (label, seconds(pair["reference"]), seconds(pair["ours"]), f"{digits(found['times_faster'][key])} ×")
            )
        for key, label in (
            ("to_first_step", "start to first optimizer step, those not encoded yet"),
            ("to_first_step_again", "the same command again, start to first optimizer step"),
        ):
            if whole := found.get(key):
                times = f"{whole['reference'] / whole['ours']:.3g} ×"
                made.append((label, seconds(whole["reference"]), seconds(whole["ours"]), times))
    for stage, label in (
        ("caching", "memory at most, 64 photographs to encode"),
        ("training", "memory at most, encoded"),
    ):
        if "memory" in peers:
            made.append((label, *sizes(peers["memory"]["peak_bytes"][stage])))
    return made


def sizes(pair: dict[str, float]) -> tuple[str, str, str]:
    return size(pair["reference"]), size(pair["ours"]), f"{pair['reference'] / pair['ours']:.2f} ×"


def unet_lines() -> list[str]:
    """A table for each machine that it was measured on."""
    lines: list[str] = []
    for found in [result(path.stem) for path in sorted(common.RESULTS.glob("unet*.json"), reverse=True)]:
        lines += [*([] if lines else ["## The UNet", ""]), *machine(found), ""]
        lines.append(
            f"`{found['command']}`: forward, backward and fused AdamW of `mid` (SDXL's graph, 106,694,404 parameters), "
            f"{found['latent']} × {found['latent']} latents, batch {found['batch']}, the library's UNet and ours in "
            "turn. The limit is the time that the step's operations take at the speed of the fastest matrix product "
            "here."
        )
        lines += ["", "| type | library | ours | times | library, of the limit | ours, of the limit |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for kind in (kind for kind in ("fp32", "bf16") if kind in found):
            one = found[kind]
            low, high = one["speed"]["quartiles"]
            lines.append(
                f"| {kind} | {seconds(one['library']['median'])} | {seconds(one['ours']['median'])} | "
                f"{one['speed']['ratio']:.2f} × ({low:.2f} to {high:.2f}) | {one['library_of_limit']:.0%} | "
                f"{one['of_limit']:.0%} |"
            )
        lines.append("")
    return lines


def page() -> str:
    peers, memory = result("peers"), result("memory")
    loop, saves = result("loop"), result("checkpoints")
    lines = [
        "# Performance",
        "",
        "Made by `python benchmarks/page.py` from `benchmarks/results/`; `make bench` measures again.",
        "",
    ]
    if wanted := list(targets()):
        lines += ["## What it is to reach", "", "Each figure's benchmark, machine and spread are below.", ""]
        lines += ["| measure | figure | target | met |", "| --- | --- | --- | --- |", *(t.row for t in wanted), ""]
    if peers:
        lines += ["## Against the reference script", "", *about(peers), ""]
        lines += ["| what | reference | ours | times |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in rows()]
        lines += ["", "![Times of the reference in units of ours](images/performance.svg)", ""]
    lines += unet_lines()
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
    lines += ["## On a GPU", "", "| measure | figure | target | met |", "| --- | --- | --- | --- |"]
    lines += [*(target.row for target in gpu_targets()), "", *gpu()]
    return "\n".join(lines).rstrip() + "\n"


def about(peers: dict[str, Any]) -> list[str]:
    gate = peers.get("gate", {})
    text = [
        "`python benchmarks/peers.py --reference DIFFUSERS --data PHOTOS`: the unmodified",
        f"`train_text_to_image_sdxl.py` of a checkout of diffusers (SHA-256 {peers['script'][:12]}…) and ours run as",
        "processes of their own with one command line, in turn; medians, and in brackets the quartiles of the rounds.",
    ]
    if "times_faster_than_kohya" in peers.get("pipeline", {}):
        low, high = peers["pipeline"]["times_faster_than_kohya"]["quartiles"]
        kohya = statistics.median(peers["pipeline"]["kohya"])
        text.append(
            f"A sample of the data set of kohya's `sd-scripts`, its files cached too, takes {seconds(kohya)}, "
            f"{peers['pipeline']['times_faster_than_kohya']['ratio']:.3g} × ours ({low:.3g} to {high:.3g})."
        )
    if "of_rounds" in peers.get("caching", {}):
        text.append(
            "Encoding is timed from the end of a program's imports until everything is encoded: it reads the data, "
            "loads tokenizers, encoders and VAE, and encodes (tiny encoders, text of SDXL's widths)."
        )
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
            "Not measured yet. `python benchmarks/gpu.py` measures full-size SDXL on one GPU in ten minutes: first the",
            "losses and speeds that are promised, beside the library's UNet in the reference's loop, then where the",
            "time of a step goes, what compiled blocks, graphs and other layouts would gain, low-memory settings and",
            "whole runs. What has to be installed there, and how where no package index is reached, is said at the top",
            "of that file. The targets are for one H200.",
        ]
    made = ["| what | images/s | share of the measured limit | memory |", "| --- | --- | --- | --- |"]
    limit = found.get("limits", {}).get("bf16 product", {}).get("operations_per_second")
    for part in ("full", "low_memory", "adapter", "ladder", "graphs", "whole"):
        for name, one in found.get(part, {}).items():
            if "images_per_second" in one:
                share = (
                    f"{one['operations_per_second'] / limit:.0%}" if limit and "operations_per_second" in one else ""
                )
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
        parts.append(f'<text x="{406 + width:.0f}" y="{y + 16}" fill="#222">{digits(value)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    (DOCS / "performance.md").write_text(page(), encoding="utf-8")
    bars = [(label, float(times.partition(" ")[0].replace(",", ""))) for label, _, _, times in rows() if times]
    unet = result("unet")
    bars += [(f"a step of the UNet alone, {k}", unet[k]["speed"]["ratio"]) for k in ("fp32", "bf16") if k in unet]
    if bars:
        PICTURE.write_text(picture(bars), encoding="utf-8")


if __name__ == "__main__":
    main()
