"""`sdxl demo`: the embedded default, from nothing to a trained model, pictures and a report, without a download."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.config import Config
from sdxl_trainer.configfile import validated
from sdxl_trainer.log import duration

PICTURES = 2000
RESOLUTION = 128
PROMPTS = (
    "a red circle on a blue background",
    "a yellow star on a purple background",
    "a white heart on a green background",
    "a black square on a white background",
)
# A VAE trained on such pictures (recipes/micro): the UNet and the text encoders of the demo begin at random.
VAE = Path(__file__).parent / "assets" / "micro" / "vae"


def run(out: Path, steps: int) -> None:
    """Draw pictures, build a small SDXL, train it, show before and after."""
    began = time.monotonic()
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    print(
        f"demo: draws {PICTURES} scenes, builds a small SDXL that knows nothing yet, and trains it for {steps} steps.\n"
        "      About five minutes on two free CPU cores; nothing is downloaded. In that time it learns what\n"
        f"      prompts say of backgrounds, not yet of shapes. Everything goes to {out}"
    )
    data = _pictures(out / "pictures")
    config = validated(settings(out, data, _base(out / "base", data), steps), "the demo's config")
    from sdxl_trainer.train import train

    output = train(config)
    print(f"\nthe demo took {duration(time.monotonic() - began)}")
    print(f"  trained model     {output}")
    print(f"  before and after  {before_after(config, output).resolve()}")
    print(f"  report            {(output / 'report.html').resolve()}")


def settings(out: Path, data: Path, base: Path, steps: int) -> dict:
    """The demo's config as plain data: an ordinary run, which `sdxl train <out>/run/config.toml` would repeat."""
    return {
        "output_dir": str(out / "run"),
        "model": {"path": str(base)},
        "data": [{"path": str(data), "resolution": RESOLUTION, "caption_dropout": 0.1}],
        "objective": {"prediction": "v_prediction", "zero_terminal_snr": True},
        "learn": [{"match": r"unet\..*"}, {"match": r"text_encoder.*"}],
        "train": {
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 1.5e-3,
            "checkpoint_every": max(1, steps // 2),
            "checkpoints_limit": 1,
            "validate_every": max(1, steps // 4),
        },
        "optimizer": {"betas": [0.9, 0.99]},
        "schedule": {"name": "cosine", "warmup_steps": min(50, steps - 1)},
        "ema": {"enabled": True, "decay": 0.99},
        "validation": {"prompts": PROMPTS, "images": 2, "steps": 20, "guidance": 3.0, "at_start": True},
    }


def before_after(config: Config, output: Path) -> Path:
    """One picture: the first row drawn before the training, the second after it, from the same prompts and seeds."""
    from PIL import Image

    steps = sorted(path for path in (output / "samples").iterdir() if path.is_dir())
    rows = [[folder / f"{number}-0.png" for number in range(len(config.validation.prompts))] for folder in steps]
    sheet = Image.new("RGB", (RESOLUTION * len(rows[0]), RESOLUTION * 2))
    for top, row in enumerate((rows[0], rows[-1])):
        for left, path in enumerate(row):
            with Image.open(path) as image:
                sheet.paste(image, (left * RESOLUTION, top * RESOLUTION))
    path = output / "before-after.png"
    files.write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))
    return path


def _pictures(folder: Path) -> Path:
    import toyworld

    if not (folder / "metadata.jsonl").is_file():
        toyworld.write_folder(folder, PICTURES, seed=0, count=1)
    return folder


def _base(folder: Path, data: Path) -> Path:
    from sdxl_trainer import blueprint

    def build(temporary: Path) -> None:
        lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        tiny = blueprint.SIZES["tiny"]
        # Eight channels and more to a group: with fewer, flat colours are little more than their signs.
        size = replace(tiny, unet=replace(tiny.unet, groups=4))
        blueprint.build(temporary, size, captions=[json.loads(line)["text"] for line in lines])
        shutil.copytree(VAE, temporary / "vae", dirs_exist_ok=True)

    if not (folder / "model_index.json").is_file():
        files.write_atomically(folder, build)
    return folder
