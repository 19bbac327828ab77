"""What rounding by chance keeps: micro-SDXL learns a new shape with its weights in fp32 and in bf16, rounded both ways.

All rows see the same pictures with the same noise, so that their losses can be compared. `way`: how far the weights
went along the way of those in fp32 under the same optimizer, 1 being as far.

    python benchmarks/rounding.py [--steps 120] [--work runs/rounding]
"""

import statistics
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from sdxl_trainer import checkpoint, demo
from sdxl_trainer.configfile import validated
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Start
from sdxl_trainer.train import train

LAST = 40  # steps whose mean loss is told
ADAMW, ADAFACTOR = 1e-4, 1e-3  # rates; Adafactor's are relative to each tensor
# Type of the weights, optimizer, its rate, and whose way is compared with. A class by its place rounds to the nearest.
ROWS: dict[str, tuple[str, str, float, str]] = {
    "fp32, adamw": ("fp32", "adamw", ADAMW, ""),
    "fp32, adamw, passes in bf16": ("fp32", "adamw", ADAMW, "fp32, adamw"),
    "bf16, adamw_bf16": ("bf16", "adamw_bf16", ADAMW, "fp32, adamw"),
    "bf16, AdamW rounded to the nearest": ("bf16", "torch.optim:AdamW", ADAMW, "fp32, adamw"),
    "fp32, adafactor": ("fp32", "adafactor", ADAFACTOR, ""),
    "bf16, adafactor": ("bf16", "adafactor", ADAFACTOR, "fp32, adafactor"),
    "bf16, Adafactor rounded to the nearest": ("bf16", "torch.optim:Adafactor", ADAFACTOR, "fp32, adafactor"),
}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--work", type=Path, default=Path("runs/rounding"))
    options = parser.parse_args()
    begin, ends = weights(demo.BASE), dict[str, dict[str, Tensor]]()
    rows = []
    for name, (kind, optimizer, rate, other) in ROWS.items():
        tree = settings(name, options.work, options.steps, kind, optimizer, rate)
        output = train(validated(tree, "benchmarks/rounding.py"), Start("restart"))
        ends[name] = weights(output)
        losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
        first, last = statistics.mean(losses[:LAST]), statistics.mean(losses[-LAST:])
        way = part(begin, ends[name], ends[other]) if other else None
        rows.append({"row": name, "rate": rate, "first": first, "last": last, "way": way})
        print(f"{name:40} first {first:.5f}  last {last:.5f}" + (f"  way {way:.3f}" if way is not None else ""))
    common.write("rounding", {"command": f"python benchmarks/rounding.py --steps {options.steps}", "rows": rows})


def settings(name: str, work: Path, steps: int, kind: str, optimizer: str, rate: float) -> dict[str, Any]:
    data = [demo.pictures(work / part, part) for part in demo.PICTURES]
    tree = demo.settings(work / name.replace(", ", "-").replace(" ", "-"), data, steps)
    tree["cache"] = {"path": str(work / "cache")}
    tree["train"] |= {"batch_size": 8, "checkpoint_every": 0, "learning_rate": rate, "weights": kind}
    tree["train"] |= {"precision": "bf16" if kind == "bf16" or "passes in bf16" in name else "fp32"}
    tree["optimizer"] = {"name": optimizer}
    tree["schedule"], tree["ema"] = {"name": "constant"}, {"enabled": False}
    del tree["validation"]
    return tree


def weights(model: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in checkpoint.read_weights(model / "unet").items()}


def part(begin: dict[str, Tensor], end: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of the way from `begin` to `other`, how much of it leads to `end`."""
    along = sum(torch.sum((end[name] - start) * (other[name] - start)) for name, start in begin.items())
    whole = sum(torch.sum((other[name] - start).square()) for name, start in begin.items())
    return float(along / whole)


if __name__ == "__main__":
    main()
