"""`python -m toyworld DIR --n 1000 --seed 0`: write an image folder."""

import argparse

from toyworld.folder import write_folder
from toyworld.shapes import BASE_SHAPES, SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m toyworld", description="Write scenes as an image folder.")
    parser.add_argument("path")
    parser.add_argument("--n", type=int, default=1000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="one size for all pictures")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(BASE_SHAPES))
    parser.add_argument("--count", type=int, choices=(1, 2), help="objects in a picture (default: mixed)")
    parser.add_argument(
        "--holdout", choices=("without", "only", "all"), default="without", help="held-out combinations"
    )
    arguments = parser.parse_args()
    folder = write_folder(
        arguments.path,
        arguments.n,
        arguments.seed,
        holdout={"without": False, "only": True, "all": None}[arguments.holdout],
        shapes=tuple(arguments.shapes),
        count=arguments.count,
        size=tuple(arguments.size) if arguments.size else None,
    )
    print(f"{arguments.n} pictures in {folder}")


if __name__ == "__main__":
    main()
