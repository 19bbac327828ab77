"""Which way to train teaches what, and what does it cost and forget? One table of all methods.

Each method teaches micro-SDXL the demo's new shape from the demo's pictures, and more of the demo's questions are asked
before and after. Beside each new picture a step has one of the shapes that the base knows, unless the row says
otherwise. Each row runs in a process of its own, in one thread. What is finished is not run again: neither a row that
was asked, nor the training of one that is asked anew.

    python benchmarks/methods.py [ROW ...] [--again] [--steps STEPS] [--rate RATE] [--work runs/methods]
    python benchmarks/methods.py --table      writes the table into docs/methods.md and runs nothing
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from sdxl_trainer import demo, files

RESULT = Path(__file__).parent / "results" / "methods.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"
MARKS = ("<!-- made by python benchmarks/methods.py -->", "<!-- end -->")
BATCH = 8
# Of 32 answers, as in the demo, one standard error is 6 points, so that equal methods seem 12 apart; of 192 it is 3.
ASKED = {"new": 192, "old": 96}
CLASS = 40  # pictures that the base draws, where it does
PARTS = ("unet", "text_encoder", "text_encoder_2")
Changes = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A method: what it is called, its learning rate, the changes to the demo's config that it is at a rate, and what
    keeps the old shapes: pictures of them, preservation (the base draws them), prediction (the base's own) or nothing;
    and its steps."""

    title: str
    rate: float
    changes: Callable[[float], Changes]
    prior: str = "pictures"
    steps: int = 800


def rules(**shares: float) -> Callable[[float], Changes]:
    """Rules over names, each with its share of the rate."""
    patterns = {
        "unet": r"unet\..*",
        "text": r"text_encoder(_2)?\..*",
        "attention": r"unet\..*\.attn[12]\..*",
        "lora_B": r".*\.lora_B\..*",
        "words": r".*token_embedding\.new\..*",
        "rest": r".*",
    }
    return lambda rate: {
        "learn": [
            {"match": patterns[name], "learning_rate": rate * share, **({"until": 0.5} if name == "words" else {})}
            for name, share in shares.items()
        ]
    }


def adapter(frozen: str = "auto", **options: Any) -> Callable[[float], Changes]:
    """An adapter of rank 8 on all layers, unless told otherwise."""
    sizes = {} if options.get("kind") in {"oft", "boft"} else {"rank": 8}
    return lambda rate: {"adapter": {"targets": "all", **sizes, **options}, "train": {"frozen": frozen}}


def kronecker(factor: int) -> Callable[[float], Changes]:
    return adapter(kind="lokr", factor=factor, rank=100_000)


def word(rate: float) -> Changes:
    return {"token": [{"name": demo.SHAPE, "vectors": 2, "init": "star"}]}


def together(*made: Callable[[float], Changes]) -> Callable[[float], Changes]:
    return lambda rate: {section: change for one in made for section, change in one(rate).items()}


FULL, LORA = rules(unet=1.0), adapter()
ROWS = {
    "full": Row("full UNet", 1.3e-3, FULL),
    "full-preservation": Row("full UNet, pictures that the base draws", 1.3e-3, FULL, "preservation"),
    "full-prediction": Row("full UNet, prior prediction", 1.3e-3, FULL, "prediction"),
    "full-alone": Row("full UNet, nothing that keeps the old shapes", 1.3e-3, FULL, ""),
    "text": Row("UNet, and both text encoders at a quarter", 1.3e-3, rules(unet=1.0, text=0.25)),
    "attention": Row("attention layers only", 2e-3, rules(attention=1.0)),
    "lora": Row("LoRA r8, all layers (LoCon)", 4e-3, LORA),
    "lora-preservation": Row("LoRA r8, all layers, pictures that the base draws", 4e-3, LORA, "preservation"),
    "lora-prediction": Row("LoRA r8, all layers, prior prediction", 4e-3, LORA, "prediction"),
    "lora-alone": Row("LoRA r8, all layers, nothing that keeps the old shapes", 4e-3, LORA, ""),
    "lora-linear": Row("LoRA r8, linear layers", 4e-3, adapter(targets="linear")),
    "lora-attention": Row("LoRA r8, attention", 4e-3, adapter(targets="attention")),
    "lora-plus": Row("LoRA+ r8, all layers, B four times as fast", 2e-3, together(LORA, rules(lora_B=4.0, rest=1.0))),
    "dora": Row("DoRA r8, all layers", 4e-3, adapter(kind="dora")),
    "loha": Row("LoHa r8, all layers", 1.2e-2, adapter(kind="loha")),
    "lokr": Row("LoKr, factor 2, second matrix whole, all layers", 6e-3, kronecker(2), steps=1600),
    "lokr-4": Row("LoKr, factor 4, second matrix whole, all layers", 4e-3, kronecker(4), steps=1600),
    "lokr-8": Row("LoKr r8, no factor given, all layers", 1.6e-2, adapter(kind="lokr"), steps=1600),
    "oft": Row("OFT, attention, blocks of 16", 4e-3, adapter(kind="oft", targets="attention", block_size=16)),
    "boft": Row("BOFT, attention, blocks of 4", 4e-3, adapter(kind="boft", targets="attention", block_size=4)),
    **{
        f"qlora-{kind}": Row(f"LoRA r8, all layers, base in {kind}", 4e-3, adapter(kind))
        for kind in ("nf4", "int8", "fp8")
    },
    "textual-inversion": Row("textual inversion, 2 vectors", 2e-2, word),
    "pivotal": Row(
        "pivotal tuning: 2 vectors for half of the run, LoRA r8, all layers",
        4e-3,
        together(word, LORA, rules(words=5.0, rest=1.0)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--again", action="store_true", help="run finished rows too")
    for name, kind in (("steps", int), ("rate", float)):
        parser.add_argument(f"--{name}", type=kind, help="try others; the row keeps its own")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    demo.ASKED = ASKED
    if options.child:
        print(json.dumps(measured(options.rows[0], options)))
        return
    for name in [] if options.table else options.rows or ["base", *ROWS]:
        key = "base" if name == "base" else tried(name, options)
        if key in of(known(), name) and not options.again:
            continue
        found = run(name, options)
        results = known()  # read again: other rows may have been finished beside this one
        of(results, name)[key] = found
        files.write_json(RESULT, results | {"batch": BATCH})
        document(results)
        print(name, key, {kind: found["accuracy"][kind]["shape"] for kind in demo.ASKED}, flush=True)
    document(known())


def known() -> dict[str, Any]:
    """What was measured; answers to fewer questions than are asked now do not count."""
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"base": {}, "tried": {}}
    for made in (results["base"], *results["tried"].values()):
        for key in [key for key, found in made.items() if found.get("asked") != ASKED]:
            del made[key]
    return results


def of(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What was measured of a row, by rate and steps."""
    return results["base"] if name == "base" else results["tried"].setdefault(name, {})


def tried(name: str, options: argparse.Namespace | None = None) -> str:
    """A row at its own rate and steps, or at those that are to be tried."""
    return f"{(options and options.rate) or ROWS[name].rate:g}, {(options and options.steps) or ROWS[name].steps} steps"


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row in a process of its own."""
    command = [sys.executable, __file__, name, "--child", "--work", str(options.work)]
    command += [f"--{key}={value}" for key in ("steps", "rate") if (value := getattr(options, key))]
    command += ["--again"] if options.again else []
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"asked": ASKED}


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a row's model was asked for and drew, and what it cost."""
    from sdxl_trainer import attach, tokens

    if name == "base":
        return {"accuracy": demo.measure(demo.pipeline(demo.BASE), demo.questions())[0]}
    tree = settings(name, options)
    output = Path(tree["output_dir"])
    costs = output.with_name("cost.json")
    if options.again or not costs.is_file():
        files.write_json(costs, trained(tree))
    cost = json.loads(costs.read_text(encoding="utf-8"))
    drawing = demo.pipeline(demo.BASE if cost["file"] else output)
    attach.attach(drawing, [str(output)] if "adapter" in tree else [])
    tokens.attach(drawing, [str(output)] if "token" in tree else [])
    return {"accuracy": demo.measure(drawing, demo.questions())[0], **cost}


def trained(tree: dict[str, Any]) -> dict[str, Any]:
    """Train a row: parameters, bytes, seconds and peak memory."""
    from sdxl_trainer.configfile import validated
    from sdxl_trainer.run import Start
    from sdxl_trainer.train import train

    config = validated(tree, "benchmarks/methods.py")
    began, used = time.monotonic(), time.process_time()
    output = train(config, Start("restart"))
    learning = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["parameters"]
    beside = [
        *output.glob("pytorch_lora_weights.safetensors"),
        *output.glob("*_adapter/*.safetensors"),
        *output.glob("learned_embeds.safetensors"),
    ]
    names = {rule["match"].partition("\\")[0].partition("(")[0] for rule in learning["rules"]}
    whole = [
        path for part in PARTS if part.removesuffix("_2") in names for path in (output / part).glob("*.safetensors")
    ]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "peak_rss_mb": common.status_bytes("VmHWM") >> 20,
        "parameters": learning["learning"],
        "file": bool(beside),
        "file_bytes": sum(path.stat().st_size for path in beside or whole),
    }


def settings(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The demo's config with the new shape's pictures alone, and the row's changes."""
    row, work = ROWS[name], options.work
    rate, steps = options.rate or row.rate, options.steps or row.steps
    data = [demo.pictures(work / kind, kind) for kind in demo.PICTURES]
    tree = demo.settings(work / f"{name}-{rate:g}-{steps}", data, steps)
    if row.prior != "pictures":
        new = {key: value for key, value in tree["data"][0].items() if key != "repeats"}
        tree["data"] = [new, *prior(row.prior, new, work)]
    tree["cache"] = {"path": str(work / "cache")}
    tree["train"] |= {"batch_size": BATCH * len(tree["data"]), "checkpoint_every": 0, "learning_rate": rate}
    del tree["validation"]
    for section, change in row.changes(rate).items():
        tree[section] = {**tree.get(section, {}), **change} if isinstance(change, dict) else change
    return tree


def prior(kind: str, new: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """The second data set of a row: as many samples of it in each step as of the new shape."""
    import toyworld

    common = {"resolution": new["resolution"], "caption_dropout": new["caption_dropout"], "regularisation": True}
    if kind == "preservation":
        asked = toyworld.prompts(CLASS, demo.SEEDS["old"], shapes=tuple(toyworld.BASE_SHAPES))
        drawn = {"generate": CLASS, "generate_prompts": [words for _, words in asked], "generate_batch": 10}
        drawn |= {"generate_steps": 20, "generate_guidance": demo.GUIDANCE, "generate_precision": "fp32"}
        return [{"path": str(work / "class"), **drawn, **common}]
    if kind == "prediction":
        return [{"path": str(renamed(Path(new["path"]), work / "renamed")), "prior_prediction": True, **common}]
    return []


def renamed(pictures: Path, folder: Path) -> Path:
    """The new shape's pictures under captions that name each of the shapes that the base knows."""
    import toyworld

    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            shutil.copy(pictures / row["file_name"], folder)
            words = row["text"].replace(f"an {demo.SHAPE}", f"a {demo.SHAPE}")
            row["text"] = [words.replace(demo.SHAPE, shape) for shape in toyworld.BASE_SHAPES]
        files.write_text(folder / "metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def document(results: dict[str, Any]) -> None:
    """Write the table between its marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{table(results)}\n{MARKS[1]}{after}", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """A row for each method at its own rate and steps; and all that was tried."""
    lines = [
        "| method | steps | new shape, % | old shapes, % | learns | file | CPU time | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before = results["base"]["base"]["accuracy"]
    tries = ["", "| method | learning rate, steps: new, old |", "| --- | --- |"]
    for name, row in ROWS.items():
        made = results["tried"].get(name, {})
        found = made.get(tried(name))
        if not found:
            continue
        now = found["accuracy"]
        new, old = (f"{100 * before[kind]['shape']:.0f} → {100 * now[kind]['shape']:.0f}" for kind in ASKED)
        size, minutes = f"{found['file_bytes'] / 1e3:,.0f} kB", f"{found['cpu_seconds'] / 60:.1f} min"
        lines.append(
            f"| {row.title} | {row.steps} | {new} | {old} | {found['parameters']:,} | {size} | {minutes} "
            f"| {found['peak_rss_mb']:,} MB |"
        )
        each = [
            f"{k}: " + ", ".join(f"{100 * v['accuracy'][kind]['shape']:.0f}" for kind in ASKED) for k, v in made.items()
        ]
        tries.append(f"| {row.title} | {'; '.join(each)} |")
    return "\n".join(lines + tries) + "\n"


if __name__ == "__main__":
    main()
