"""`sdxl demo`: the embedded default, from nothing to a trained model, pictures and a report, without a download."""

import time
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.configfile import validated
from sdxl_trainer.log import duration

PICTURES = 64
RESOLUTION = 128


def run(out: Path, steps: int) -> None:
    """Draw pictures, build a small random SDXL, fine-tune it, show before and after."""
    began = time.monotonic()
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    print(f"demo: {PICTURES} drawn scenes, a small SDXL with random weights, {steps} steps of training in {out}")
    data = _pictures(out / "pictures")
    base = _base(out / "base", data)
    prompts = _captions(data)[:4]
    config = {
        "output_dir": str(out / "run"),
        "model": {"path": str(base)},
        "data": [{"path": str(data), "resolution": RESOLUTION, "flip": False, "caption_dropout": 0.1}],
        "objective": {"snr_gamma": 5.0},
        "train": {
            "steps": steps,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "checkpoint_every": max(1, steps // 2),
            "validate_every": max(1, steps // 2),
        },
        "schedule": {"name": "cosine", "warmup_steps": min(20, steps - 1)},
        "ema": {"enabled": True, "decay": 0.99},
        "validation": {"prompts": prompts, "images": 2, "steps": 20, "guidance": 3.0},
    }
    from sdxl_trainer.train import train

    output = train(validated(config, "the demo's config"))
    print(f"\nthe demo took {duration(time.monotonic() - began)}")
    print(f"  trained model  {output}")
    print(f"  pictures       {output / 'samples'}")
    print(f"  report         {(output / 'report.html').resolve()}")


def _pictures(folder: Path) -> Path:
    import toyworld

    if not (folder / "metadata.jsonl").is_file():
        toyworld.write_folder(folder, PICTURES, seed=0)
    return folder


def _base(folder: Path, data: Path) -> Path:
    from sdxl_trainer import blueprint

    if not (folder / "model_index.json").is_file():
        blueprint.build(folder, "tiny", captions=_captions(data))
    return folder


def _captions(data: Path) -> list[str]:
    import json

    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["text"] for line in lines))
