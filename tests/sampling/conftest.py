"""A tiny refiner, a tiny inpainting model, a picture and a mask."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CAPTIONS


@pytest.fixture(scope="session")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdxl_trainer.blueprint import build

    return build(tmp_path_factory.mktemp("refiner") / "tiny", "tiny", captions=CAPTIONS, seed=3, kind="refiner")


@pytest.fixture(scope="session")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sdxl_trainer.blueprint import build

    return build(tmp_path_factory.mktemp("inpainting") / "tiny", "tiny", captions=CAPTIONS, seed=4, kind="inpainting")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    rows, columns = np.mgrid[0:72, 0:64]
    Image.fromarray(np.stack([rows * 3, columns * 4, 255 - rows * 3], axis=2).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    values = np.zeros((72, 64), dtype=np.uint8)
    values[16:48, 8:40] = 255
    Image.fromarray(values).save(path)
    return path
