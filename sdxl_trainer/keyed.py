"""Randomness as a function of (seed, purpose, epoch, sample), never of history (law 1).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
key and counter *are* the state, so nothing has to be saved, and a draw does not depend on rank, batch or
on how often the run was interrupted.
"""

import numpy as np

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


def generator(seed: int, purpose: str, epoch: int = 0, sample: int = 0) -> np.random.Generator:
    """The generator of one draw. All arguments are integers of up to 64 bits; equal arguments, equal numbers."""
    key = np.array([seed & _MASK, PURPOSES[purpose]], dtype=np.uint64)
    # The low counter word is left to the generator: 2^64 draws before two keys could meet.
    counter = np.array([0, 0, epoch & _MASK, sample & _MASK], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
