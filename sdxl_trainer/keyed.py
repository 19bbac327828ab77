"""Randomness as a function of (seed, purpose, epoch, sample), never of history (law 1).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
key and counter *are* the state, so nothing has to be saved, and a draw does not depend on rank, batch or
on how often the run was interrupted.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

PURPOSES = {
    name: number
    for number, name in enumerate(
        [
            "order",
            "variant",
            "caption",
            "dropout",
            "posterior",
            "noise",
            "offset",
            "timestep",
            "crop",
            "subset",
            "split",
            "adapter",
            "leftovers",
            "pass",
            "validation",
            "rounding",
            "token",
            "strata",
            "pyramid",
            "offset_strength",
            "perturbation",
            "perturbation_strength",
            "variants",
            "wording",
            "drop_encoder_1",
            "drop_encoder_2",
            "class",
            "hole",
            "masked",
            "which_hole",
        ]
    )
}
_MASK = (1 << 64) - 1


class _Key(ISeedSequence):
    """Hands Philox its key as it is. `Philox(key=...)` does the same, after asking the system for randomness that it
    then does not use, which takes twice as long as all the rest."""

    def __init__(self, key: np.ndarray) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self.key


@lru_cache(maxsize=4 * len(PURPOSES))
def _key(seed: int, purpose: str) -> _Key:
    return _Key(np.array([seed & _MASK, PURPOSES[purpose]], dtype=np.uint64))


def generator(seed: int, purpose: str, epoch: int = 0, sample: int = 0) -> np.random.Generator:
    """The generator of one draw. All arguments are integers of up to 64 bits; equal arguments, equal numbers."""
    # The low counter word is left to the generator: 2^64 draws before two keys could meet.
    counter = np.array([0, 0, epoch & _MASK, sample & _MASK], dtype=np.uint64)
    # NumPy's stubs know of no ISeedSequence but its own.
    return np.random.Generator(np.random.Philox(_key(seed, purpose), counter=counter))  # type: ignore[arg-type]
