"""Draw the pictures that micro-SDXL learns from.

    python recipes/micro/data.py OUT [--squares 20000] [--varied 5000]

`OUT/squares`: all of 128 x 128, so that what a caption says of places is what the model sees. `OUT/varied`: all sizes
and aspect ratios, from which training takes crops. Neither shows a combination that is held out for evaluation.
"""

import argparse
from pathlib import Path

import toyworld

SIDE = 128
SQUARES_SEED, VARIED_SEED = 1, 2


def write(out: Path, squares: int, varied: int) -> None:
    """Write both folders, each unless it is complete already."""
    for name, count, seed, size in (
        ("squares", squares, SQUARES_SEED, (SIDE, SIDE)),
        ("varied", varied, VARIED_SEED, None),
    ):
        listed = out / name / "metadata.jsonl"
        if not listed.exists() or len(listed.read_text(encoding="utf-8").splitlines()) != count:
            toyworld.write_folder(out / name, count, seed, holdout=False, size=size)
        print(f"{count} pictures in {out / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures that micro-SDXL learns from.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--squares", type=int, default=20_000)
    parser.add_argument("--varied", type=int, default=5_000)
    arguments = parser.parse_args()
    write(arguments.out, arguments.squares, arguments.varied)


if __name__ == "__main__":
    main()
