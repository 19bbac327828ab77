"""docs/numerics.md: every place in the code that it names is there, no formula that a config can name is missing."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import noise, objective, timesteps
from sdxl_trainer.optim import rates

PAGE = Path(__file__).parent.parent.parent / "docs" / "numerics.md"
ROWS = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if "| `" in line]
PLACES = sorted({place for row in ROWS for place in re.findall(r"`([\w.]+)`", row[-1])})


@pytest.mark.parametrize("place", PLACES)
def test_the_places_are_in_the_code(place: str) -> None:
    found(place)


def found(place: str) -> Any:
    """What a dotted name below sdxl_trainer names."""
    parts = place.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(["sdxl_trainer", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise AssertionError(place)


def test_no_formula_of_the_tables_is_missing() -> None:
    """What a config can choose by name stands on the page."""
    functions = [target for target, _ in objective.PREDICTIONS.values()]
    functions += [weight for weight in objective.WEIGHTS.values() if weight.__name__ != "<lambda>"]
    functions += [*noise.NOISES.values(), *timesteps.SPREADS.values()]
    functions += [density for density in timesteps.DENSITIES.values() if density.__name__ != "<lambda>"]
    functions.remove(timesteps.SPREADS["independent"])
    named = {found(place) for place in PLACES if place.count(".") == 1 and callable(found(place))}
    assert {function.__name__ for function in functions} <= {value.__name__ for value in named}
    assert "optim.rates.SHAPES" in PLACES
    assert set(rates.SHAPES)
