"""What is said where a step does not fit, and what it costs to find out."""

from collections.abc import Callable
from typing import Any

import pytest

from sdxl_trainer import memory
from sdxl_trainer.errors import UserError
from tests.test_memory import skeleton


def test_each_pass_is_counted_once_where_nothing_fits(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One takes a minute at full size, and how narrow a frozen base is kept changes the weights alone."""
    counted: list[memory.Pass] = []
    count = memory._count
    monkeypatch.setattr(memory, "_count", lambda sdxl, given: counted.append(given) or count(sdxl, given))
    chosen = config(train={"memory": "1MB"}, adapter={"rank": 2})
    sdxl, groups = skeleton(chosen)
    one = memory.Step((1, 16, 16), "bf16", "cuda")
    with pytest.raises(UserError, match="the smallest step takes") as refused:
        memory.fit(chosen, sdxl, groups, one, lambda _: None)
    assert 0 < len(counted) == len(set(counted)) < 5, "no more than there are shares of the blocks"
    for kind in ("fp8", "nf4"):
        least = {"frozen": kind, "gradient_checkpointing": True}
        parts = memory.parts(config(train=least, adapter={"rank": 2}), sdxl, groups, one)
        assert f"train.frozen = {kind}: {sum(parts.values()) / 1e9:.2f} GB" in refused.value.fix
