"""Make micro-SDXL from nothing: tokenizers, text encoders, VAE, pictures, training, the shipped folder, its evaluation.

    python recipes/micro/make.py OUT [section.key=value ...]

The same command continues after an interruption: each part that is there is left as it is, and the two trainings
resume. What follows OUT changes options of base.toml, for example `train.batch_size=256` on a GPU.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


PLACES = {
    "output_dir": "base",
    "model.path": "untrained",
    "data.0.path": "data/squares",
    "data.1.path": "data/varied",
    "cache.path": "cache",
}


def places(out: Path) -> dict[str, Path]:
    """Where base.toml finds the parts and puts the result."""
    return {option: out / place for option, place in PLACES.items()}


def run(*command: str | Path) -> None:
    """Run a command of this Python; its failure is this script's."""
    print("+", *command, flush=True)
    status = subprocess.run([sys.executable, *map(str, command)], check=False).returncode
    if status:
        sys.exit(status)


def make(out: Path, overrides: list[str]) -> None:
    """All parts in order."""
    if not (out / "tokenizers" / "tokenizer_2" / "tokenizer_config.json").exists():
        run(HERE / "make_tokenizers.py", out / "tokenizers")
    if not (out / "text").exists():
        run(HERE / "train_text.py", out / "text", "--tokenizers", out / "tokenizers")
    run(HERE / "train_vae.py", out / "vae")
    run(HERE / "data.py", out / "data")
    if not (out / "untrained" / "model_index.json").exists():
        given = ("--vae", out / "vae" / "final", "--tokenizers", out / "tokenizers", "--text", out / "text")
        run(HERE / "make_base.py", out / "untrained", *given)
    changes = [f"{option}={place}" for option, place in places(out).items()]
    run("-m", "sdxl_trainer", "train", HERE / "base.toml", *changes, *overrides)
    run(HERE / "ship.py", out / "base", out / "ship")
    run(HERE / "evaluate.py", out / "ship", "--pairs", "200", "--out", out / "evaluation")
    run(HERE / "edit.py", out / "ship", "--out", out / "evaluation")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(2)
    make(Path(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    main()
