"""What the demo teaches and what it forgets, over several seeds of its training, with any changes to its config.

    python benchmarks/forgetting.py [NAME] [--seeds 0 1 2] [--steps N] [--old N] [section.key=value ...]

Each seed trains in one thread; the pictures and all questions are the demo's. A seed that is finished is not run
again. Prints a line for each seed and for the worst of them; benchmarks/results/forgetting.json keeps them under NAME.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sdxl_trainer import configfile, demo, files
from sdxl_trainer.train import train

RESULT = Path(__file__).parent / "results" / "forgetting.json"
ATTRIBUTES = ("shape", "colour", "place", "background")
Scored = demo.Scored


def row(before: Scored, after: Scored, **more: float) -> dict[str, float]:
    """The share of right new shapes, and what was lost of the old things, in percentage points."""
    lost = {f"lost_{name}": 100 * (before["old"][name] - after["old"][name]) for name in ATTRIBUTES}
    return {"new_shape": 100 * after["new"]["shape"], **lost} | more


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """The least that was learned, and the most that was lost and took."""
    return {name: (min if name == "new_shape" else max)(found[name] for found in rows) for name in rows[0]}


def taught(work: Path, seed: int, arguments: argparse.Namespace, before: Scored) -> dict[str, float]:
    """Train the demo's config with one seed, and ask."""
    written = work / f"{arguments.name}-{seed}.toml"
    data = [demo.pictures(work / f"{kind}-{count}", kind) for kind, count in demo.PICTURES.items()]
    tree = demo.settings(work / f"{arguments.name}-{seed}", data, arguments.steps)
    files.write_text(written, configfile.dumps(configfile.validated(tree, "the demo's config")))
    changes = [f"seed={seed}", f"cache.path={work / 'cache'}", "validation.prompts=[]", *arguments.changes]
    began, used = time.monotonic(), time.process_time()
    output = train(configfile.load(written, changes))
    spent = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - used, 1)}
    after, _ = demo.measure(demo.pipeline(output), demo.questions())
    return row(before, after, **spent)


def shown(title: str, found: dict[str, float]) -> str:
    return f"{title:<8}" + "  ".join(f"{name} {value:.1f}" for name, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="What the demo teaches and what it forgets, over several seeds.")
    parser.add_argument("name", nargs="?", default="demo")
    parser.add_argument("changes", nargs="*", help="options of the config: section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
    parser.add_argument("--old", type=int, default=demo.PICTURES["old"], help="pictures of shapes that the base knows")
    parser.add_argument("--work", type=Path, default=Path("runs/forgetting"))
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    demo.PICTURES["old"] = arguments.old
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    asked = json.loads(json.dumps([demo.PICTURES, demo.ASKED, arguments.steps, arguments.changes]))
    if known.get(arguments.name, {}).get("asked") != asked:
        known[arguments.name] = {"asked": asked, "rows": {}}
    rows = known[arguments.name]["rows"]
    before: Scored | None = known.get("base")
    for seed in map(str, arguments.seeds):
        if before is None:
            before, _ = demo.measure(demo.pipeline(demo.BASE), demo.questions())
            known["base"] = before
        if seed not in rows:
            rows[seed] = taught(work, int(seed), arguments, before)
            files.write_json(RESULT, known)
        print(shown(f"seed {seed}", rows[seed]), flush=True)
    print(shown("worst", worst([rows[str(seed)] for seed in arguments.seeds])))


if __name__ == "__main__":
    main()
