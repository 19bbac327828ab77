"""Confidence intervals of means."""

import math
import statistics
from collections.abc import Sequence

# Quantiles of Student's t for 95 % and 1, 2, ... degrees of freedom; beyond, its expansion is exact to three digits.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz & Stegun 1964, 26.7.5)."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of two or more values."""
    return quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
