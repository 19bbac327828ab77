"""One self-contained page about a data set before its training: `write(path, facts)`, from facts of `sdxl check`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.errors import plural
from sdxl_trainer.report.frame import document
from sdxl_trainer.report.sections import tiles
from sdxl_trainer.report.words import count, duration, grid, safe, section, table, tables

LEVELS = {
    "stops": ("bad", "stops the run"),
    "harms": ("open", "harms the result"),
    "look": ("good", "worth a look"),
}


def write(path: Path, facts: dict[str, Any]) -> Path:
    """Write the page and return its path."""
    with files.explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, as file names can hold, is not text that a file can hold.
        files.write_text(path, page(facts).encode("utf-8", errors="replace").decode("utf-8"))
    return path


def page(facts: dict[str, Any]) -> str:
    return document(f"{safe(facts['name'], 120)} · data set", body(facts))


def body(facts: dict[str, Any]) -> str:
    """The sections, in the order in which people ask: is it fine, what is wrong, what does the model see, what does it
    cost."""
    near = [shown for name, shown in facts["shown"].items() if name.startswith("near copies")]
    copies = "".join(f'<div class="copies">{gallery(facts, group)}</div>' for group in near)
    return (
        f"<main>{heading(facts)}{figures(facts)}"
        + section("What to mend", "findings", findings(facts))
        + section("What the model sees", "sample", sample(facts))
        + section("Cut off most", "cut", gallery(facts, facts["shown"]["cut off most"]))
        + section("Enlarged most", "enlarged", gallery(facts, facts["shown"]["enlarged most"]))
        + section("Look alike", "alike", copies)
        + section("Sizes that are trained", "buckets", buckets(facts))
        + section("Captions", "captions", captions(facts))
        + section("What was found in the data sets", "counts", counts(facts))
        + section("What it costs", "costs", costs(facts))
        + "</main>"
    )


def heading(facts: dict[str, Any]) -> str:
    levels = [finding["level"] for finding in facts["findings"]]
    if "stops" in levels:
        chip, said = "bad", "not ready"
    elif "harms" in levels:
        chip, said = "open", "ready, with harm"
    else:
        chip, said = "good", "ready"
    stops, harms = (sum(level == name for level in levels) for name in ("stops", "harms"))
    verdict = (
        f"{plural(stops, 'thing stops', 'things stop')} the run."
        if stops
        else f"Nothing stops the run; {plural(harms, 'thing')} will harm what is learned."
        if harms
        else "Nothing stops the run, and nothing was found that harms it."
    )
    looked = facts["looked_at"]
    all_of = "all" if looked["pictures"] >= looked["of"] else f"{looked['pictures']:,} of"
    return (
        f'<header><h1>{safe(facts["name"], 120)} <span class="chip {chip}">{said}</span></h1><p>{verdict}</p>'
        f'<p class="muted">Headers and hashes of all pictures were read; {all_of} {looked["of"]:,} different pictures '
        "were decoded and looked at, evenly spread.</p></header>"
    )


def figures(facts: dict[str, Any]) -> str:
    trained = sum(row["trained"] for row in facts["counts"])
    unusable = sum(row["unusable"] for row in facts["counts"])
    held = sum(row["held_out"] for row in facts["counts"])
    beside = [f"{count(held)} held out"] * bool(held) + [f"{count(unusable)} cannot be used"] * bool(unusable)
    steps, encode = facts["steps"], facts["to_encode"]
    memory = table(facts, "tables", "memory").get("together", "–")
    return tiles(
        [
            ("Pictures", count(trained), ", ".join(beside)),
            (
                "Steps",
                count(steps["all"]),
                f"{count(steps['epoch'])} per epoch, {plural(steps['batch_size'], 'picture')} each",
            ),
            ("Time", duration(facts["time"]["seconds"]), "a first estimate"),
            ("Memory", safe(memory), "at most, while training"),
            (
                "To encode",
                plural(encode["latents"], "latent"),
                f"{size(encode['bytes'])}; {plural(encode['captions'], 'caption')}",
            ),
        ]
    )


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def findings(facts: dict[str, Any]) -> str:
    """One card for each, worst first."""
    if not facts["findings"]:
        return "<p>Nothing.</p>"
    return "".join(_finding(facts, finding) for finding in facts["findings"])


def _finding(facts: dict[str, Any], finding: dict[str, Any]) -> str:
    kind, level = LEVELS[finding["level"]]
    # Captions are spoken of without their subject.
    what = f"captions {finding['what']}" if finding in facts["captions"]["findings"] else finding["what"]
    rows = [
        f'<li><bdi class="name">{safe(name, 160)}</bdi>{f" <bdi>{safe(seen, 300)}</bdi>" if seen else ""}</li>'
        for name, seen in finding["examples"]
    ]
    more = finding["count"] - len(rows)
    rows += [f'<li class="muted">and {more:,} more</li>'] if more > 0 and finding["name"] not in GROUPED else []
    return (
        f'<article class="finding"><h3><span class="chip {kind}">{level}</span>{safe(what[:1].upper() + what[1:], 300)}'
        f' <span class="muted">· {count(finding["count"])}</span></h3>'
        f"<p><b>To do:</b> {safe(finding['fix'], 400)}</p><ul>{''.join(rows)}</ul></article>"
    )


# Findings whose examples are groups, not single pictures.
GROUPED = ("copies", "near copies")


def sample(facts: dict[str, Any]) -> str:
    note = (
        '<p class="muted">The frame is what is trained; what is dimmed is cut off. Below: the size of the original, '
        "and the size that it is trained at.</p>"
    )
    return note + gallery(facts, facts["shown"]["sample"])


def gallery(facts: dict[str, Any], shown: Sequence[dict[str, Any]]) -> str:
    """Thumbnails with the crop drawn on them."""
    cells = "".join(_cell(facts, picture) for picture in shown if picture["number"] in facts["thumbnails"])
    return f'<ul class="gallery">{cells}</ul>' if cells else ""


def _cell(facts: dict[str, Any], shown: dict[str, Any]) -> str:
    left, top, width, height = (100 * share for share in shown["crop"])
    place = f"left:{left:.2f}%;top:{top:.2f}%;width:{width:.2f}%;height:{height:.2f}%"
    (w, h), (columns, rows) = shown["size"], shown["target"]
    notes = [f"{shown['cut_off']:.0%} cut off"] if shown["cut_off"] >= 0.005 else []
    notes += [f"enlarged {shown['enlarged']:.2f} times"] if shown["enlarged"] > 1 else []
    notes += [f"{shown['crops']} crops and flips"] if shown["crops"] > 1 else []
    caption, name = safe(" / ".join(shown["captions"]), 200), safe(shown["name"], 80)
    return (
        f'<li><div class="crop" style="max-width:{max(60, 220 * w // h)}px">'
        f'<img src="{facts["thumbnails"][shown["number"]]}" alt="{name}" width="{w}" height="{h}" loading="lazy">'
        f'<i style="{place}"></i></div>'
        f'<p class="name"><bdi>{name.replace("/", "/<wbr>")}</bdi></p><p class="caption"><bdi>{caption}</bdi></p>'
        f"<small>{w}×{h} → {columns}×{rows}{''.join(f'<br>{note}' for note in notes)}</small></li>"
    )


def buckets(facts: dict[str, Any]) -> str:
    """A row per size, with its shape drawn and a bar for its pictures."""
    most = max(row["pictures"] for row in facts["buckets"])
    longest = max(max(row["width"], row["height"]) for row in facts["buckets"])
    rows = []
    for row in facts["buckets"]:
        width, height = (max(2, round(34 * row[side] / longest)) for side in ("width", "height"))
        shape = f'<i class="shape" style="width:{width}px;height:{height}px"></i>'
        large = f"{row['enlarged']:.2f} times" if row["enlarged"] > 1 else "–"
        bar = f'<span class="bar" style="width:{100 * row["pictures"] / most:.1f}%"></span>'
        rows.append(
            [shape, f"{row['width']} × {row['height']}", count(row["pictures"]), f"{row['cut_off']:.1%}", large, bar]
        )
    left = table(facts, "tables", "data").get("left over")
    note = f'<p class="muted">Left over from full batches: {safe(left)}.</p>' if left else ""
    heads = ["shape", "width × height", "pictures", "cut off", "enlarged up to", "share"]
    return grid("Sizes", heads, rows, (2, 3, 4)) + note


def captions(facts: dict[str, Any]) -> str:
    words = facts["captions"]
    tokens = "".join(
        f"<div><dt>{name} tokens</dt><dd>{count(value)}</dd></div>" for name, value in words["tokens"].items()
    )
    chunks = ", ".join(f"{count(n)} of {plural(int(k), 'chunk')}" for k, n in words["chunks"].items())
    most = max((n for _, n in words["tags"]), default=1)
    bars = "".join(
        f"<li><span><bdi>{safe(tag, 60)}</bdi> <b>{count(n)}</b></span>"
        f'<span class="bar" style="width:{100 * n / most:.1f}%"></span></li>'
        for tag, n in words["tags"]
    )
    frequent = f'<h3 class="more">Most frequent</h3><ul class="tags">{bars}</ul>' if bars else ""
    return (
        f"<p>{plural(words['captions'], 'different caption')}, {plural(words['prompts'], 'text')} with their variants; "
        f'{chunks} of 75 tokens.</p><dl class="figures">{tokens}</dl>' + frequent
    )


def counts(facts: dict[str, Any]) -> str:
    """What became of every file or row: the numbers of a row add up to what was met."""
    rows = []
    for row in tables(facts, "counts"):
        skipped = ", ".join(f"{safe(name, 60)} {count(n)}" for name, n in row["skipped"].items() if n)
        rows.append(
            [
                safe(row["path"], 200),
                count(row["trained"] + row["held_out"] + row["unusable"]),
                count(row["trained"]),
                count(row["held_out"]),
                count(row["unusable"]),
                skipped or "nothing",
            ]
        )
    heads = ["data set", "pictures", "trained", "held out", "cannot be used", "left out: other files"]
    return grid("Data sets", heads, rows, (1, 2, 3, 4))


def costs(facts: dict[str, Any]) -> str:
    """The tables that the terminal shows too."""
    time = f"<p>{duration(facts['time']['seconds'])}, from {safe(facts['time']['from'], 200)}.</p>"
    parts = []
    for title, rows in table(facts, "tables").items():
        if title in {"captions"}:
            continue
        cells = [[safe(name, 200), safe(value, 300)] for name, value in rows.items()]
        parts.append(f"<details><summary>{safe(title)}</summary>{grid(safe(title), ['', ''], cells)}</details>")
    notes = "".join(f"<li>{safe(line, 300)}</li>" for line in facts["notes"])
    return time + "".join(parts) + (f"<ul>{notes}</ul>" if notes else "")
