"""The memory that is predicted for a training step against what it takes: 38 settings.

    python benchmarks/memory.py [--size mid] [--only NAME]

Predicted is what `sdxl check` tells; measured is the peak of the process's resident memory over two steps, less what
it was before the model. The C library is told to give memory back at once, so that the peak is the program's.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from sdxl_trainer import adapters, blueprint, configfile, ema, memory, model, optim, parameters
from sdxl_trainer import unet as unets
from sdxl_trainer.config import Config
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.optim import backward

# The C library's own: blocks from this size on are mapped, and unmapped when they are freed.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def settings() -> dict[str, dict[str, Any]]:
    """Sizes, optimizers, types, checkpointing, accumulation, averages, adapters: one name for each."""
    plain: dict[str, Any] = {"samples": 4, "latent": 32}
    made = {"plain": plain}
    made |= {f"batch {n}": {"samples": n} for n in (1, 2, 8)}
    made |= {f"latent {n}": {"latent": n} for n in (16, 24, 48)}
    made |= {f"checkpointing, batch {n}": {"checkpointing": True, "samples": n} for n in (1, 4, 16)}
    made |= {f"checkpointing {share} of the blocks": {"checkpointing": share, "samples": 16} for share in (0.25, 0.5)}
    made |= {
        name: {"optimizer": name} for name in ("adafactor", "sgd", "lion", "muon", "came", "prodigy", "schedulefree")
    }
    made |= {f"{name}, batch 1": {"optimizer": name, "samples": 1} for name in ("adafactor", "sgd")}
    made |= {
        f"bf16 weights, batch {n}": {"weights": "bf16", "optimizer": "adamw_bf16", "samples": n} for n in (1, 4, 8)
    }
    made["bf16 weights, checkpointing"] = {"weights": "bf16", "optimizer": "adamw_bf16", "checkpointing": True}
    masters = {"weights": "bf16", "optimizer": "adamw", "master": True}
    made |= {"masters of bf16 weights": masters, "masters, checkpointing": {**masters, "checkpointing": True}}
    made["bf16 weights, adafactor"] = {"weights": "bf16", "optimizer": "adafactor"}
    made |= {f"autocast, batch {n}": {"precision": "bf16", "samples": n} for n in (1, 4)}
    made["autocast, checkpointing"] = {"precision": "bf16", "checkpointing": True}
    made |= {f"{n} micro-batches": {"micro_batches": n, "samples": 2} for n in (2, 3)}
    made |= {f"adapter of rank {r}": {"rank": r} for r in (4, 64)}
    made["adapter, checkpointing"] = {"rank": 16, "checkpointing": True}
    made["adapter, batch 8"] = {"rank": 16, "samples": 8}
    made["averages"] = {"ema": True}
    made["averages, bf16 weights, checkpointing"] = {**made["bf16 weights, checkpointing"], "ema": True}
    made |= {f"fused backward, {name}": {"fused": True, "optimizer": name} for name in ("adamw", "adafactor")}
    freed = {"fused": True, "optimizer": "adafactor", "checkpointing": True}
    made["fused backward, adafactor, checkpointing"] = freed
    made["fused backward, adafactor, checkpointing, bf16 weights"] = {**freed, "weights": "bf16"}
    return {name: {**plain, **setting} for name, setting in made.items()}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", default="mid", choices=sorted(blueprint.SIZES))
    parser.add_argument("--only", help="the one setting of this name")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATION.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATION})
    chosen = {n: s for n, s in settings().items() if options.only in {None, n}}
    config = blueprint.configs(blueprint.SIZES[options.size])["unet"]
    measured(config, {"samples": 1, "latent": 16})  # what libraries make for themselves at first
    rows = []
    for name, setting in chosen.items():
        predicted, found = predict(config, setting), measured(config, setting)
        rows.append({"setting": name, "predicted": predicted, "measured": found, "off": predicted / found - 1})
        print(f"{name:32} predicted {predicted / 1e6:7.0f} MB  measured {found / 1e6:7.0f} MB  {rows[-1]['off']:+.1%}")
        within = sum(abs(row["off"]) <= 0.1 for row in rows)
        result = {
            "command": f"python benchmarks/memory.py --size {options.size}",
            "rows": rows,
            "within_10_percent": within,
        }
        common.write("memory", result)
    print(f"{within} of {len(rows)} within 10 %")


def described(setting: dict[str, Any]) -> Config:
    tree = {
        "output_dir": "run",
        "model": {"path": "base"},
        "data": [{"path": "pictures"}],
        "train": {
            "steps": 1,
            "learning_rate": 1.0 if setting.get("optimizer") == "prodigy" else 1e-6,
            "weights": setting.get("weights", "fp32"),
            "gradient_checkpointing": setting.get("checkpointing", False),
            "fused_backward": setting.get("fused", False),
        },
        "optimizer": {"name": setting.get("optimizer", "adamw"), "master": setting.get("master", False)},
        "ema": {"enabled": setting.get("ema", False)},
    }
    return configfile.validated(
        {**tree, **({"adapter": {"rank": setting["rank"]}} if "rank" in setting else {})}, "benchmark"
    )


def prepared(config: Config, unet: nn.Module) -> tuple[model.SDXL, list[parameters.Group]]:
    """What learns, as a run decides it."""
    sdxl = model.SDXL(unet)
    if config.adapter:
        adapters.inject(sdxl, config.adapter, 0)
    found = parameters.apply_rules(sdxl, parameters.rules(config), config.train, config.optimizer, sdxl.closed())
    return sdxl, found


def precision(setting: dict[str, Any]) -> str:
    return setting.get("precision", "bf16" if setting.get("weights") == "bf16" else "fp32")


def predict(unet: dict[str, Any], setting: dict[str, Any]) -> float:
    config = described(setting)
    with torch.device("meta"):
        sdxl, groups = prepared(config, unets.UNet(unet))
    shape = (setting["samples"], setting["latent"], setting["latent"])
    step = memory.Step(shape, precision(setting), "cpu", micro_batches=setting.get("micro_batches", 1))
    return sum(memory.parts(config, sdxl, groups, step).values())


def measured(unet: dict[str, Any], setting: dict[str, Any]) -> float:
    """Bytes by which the resident memory grew at most."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
    before = common.status_bytes("VmRSS")
    _train(unet, setting)
    return common.status_bytes("VmHWM") - before


def _train(unet: dict[str, Any], setting: dict[str, Any]) -> None:
    config = described(setting)
    dtype, kind = DTYPES[config.train.weights], DTYPES[precision(setting)]
    with torch.device("meta"):
        made: Any = unets.UNet(unet)
    made = made.to(dtype).to_empty(device="cpu")
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    if config.train.gradient_checkpointing:
        made.enable_gradient_checkpointing(float(config.train.gradient_checkpointing))
    _, groups = prepared(config, made.train())
    optimizer = optim.make(groups, config.optimizer, 0, torch.device("cpu"))
    averages = ema.make(groups, config.ema.decay) if config.ema.enabled else None
    samples, latent = setting["samples"], setting["latent"]
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    inputs = torch.float32 if precision(setting) == "fp32" else dtype
    noisy = torch.randn(samples, 4, latent, latent, dtype=inputs)
    states = torch.randn(samples, 77, unet["cross_attention_dim"], dtype=inputs)
    added = {"text_embeds": torch.randn(samples, pooled, dtype=inputs), "time_ids": torch.full((samples, 6), 256)}
    learning = [p for group in groups for p in group.parameters]

    def passes() -> Any:
        with torch.autocast("cpu", kind, enabled=kind != dtype, cache_enabled=False):
            found = made(noisy, torch.zeros(samples), states, added)[0]
        loss = found.float().square().mean()
        del found
        loss.backward()
        return loss.detach()

    for _ in range(2):
        if config.train.fused_backward:
            _, norm = backward.norm(learning, passes)
            backward.step(optimizer, learning, norm, 1.0, passes)
            continue
        for _ in range(setting.get("micro_batches", 1)):
            passes()
        optimizer.step()
        optimizer.zero_grad()
        if averages:
            averages.update()


if __name__ == "__main__":
    main()
