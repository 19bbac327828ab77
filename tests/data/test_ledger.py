"""What `sdxl check` says of sizes, repeats and held-out pictures, with exact counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import base as bases
from sdxl_trainer.config import Data
from sdxl_trainer.data import ledger, prepare
from sdxl_trainer.data.geometry import variants
from tests.conftest import draw_folder


@pytest.mark.parametrize(
    ("size", "target", "lost"),
    [((1080, 1920), (768, 1344), 1.5), ((2000, 3000), (832, 1216), 2.6), ((3000, 4000), (896, 1152), 3.5)],
)
def test_figures_in_the_docs(size: tuple[int, int], target: tuple[int, int], lost: float) -> None:
    geometry = variants(Data(path="x", buckets="area"), size, 1, "p")[0]
    assert geometry.target == target
    assert round(100 * ledger.cut_off(geometry), 1) == lost


def test_rows(config: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    draw_folder(folder, [(64, 64)] * 3 + [(64, 100)] * 4 + [(40, 40)] + [(90, 50)] * 2)
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    buckets = {"buckets": "area", "bucket_step": 16, "bucket_min": 32}
    held = {"held_out": 0.3, "weight": 0.5}
    made = config(data=[{"path": str(folder), "repeats": 3, **buckets}, held], train={"batch_size": 4})
    stock = prepare.take_stock(made, bases.resolve(made.model, tmp_path), "fp32")
    found = dict(ledger.rows(made, stock, prepare.order(made, stock)))
    assert found[str(folder)] == "10 pictures, 30 samples per epoch"
    left = len(stock.held_out)
    second = made.data[1].path
    assert (
        found[second]
        == f"{6 - left} pictures, {6 - left} samples per epoch, loss weight 0.5, {left} held out ({left / 6:.1%})"
    )
    assert found["64 x 64"].startswith(f"{4 + 6 - left} pictures, ")
    assert found["64 x 64"].endswith("enlarged up to 1.60 times")
    assert found["80 x 48"] == "4 pictures, 5.9% cut off", "100 x 64 becomes 80 x 51, of which 48 rows are taken"
    assert found["48 x 80"].startswith("2 pictures, ")
    assert found["enlarged pictures"] == "1: 7.png"
    assert found["left over"].startswith("none: the first epoch has ")
    same = 1 + sum(p.name == "2.png" for p in stock.pictures if p.data is made.data[1])
    assert found["duplicates"].startswith(f"{same} picture{'s' * (same > 1)} ha"), "2.png is drawn alike in both"
