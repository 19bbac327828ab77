"""A studio of its own for each test: in this process for the server, served on a port for the browser."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdxl_trainer.studio import app

TOKEN, PORT = "t" * 43, 7860
ADDRESS = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures with text files beside three of them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(384, 256), (256, 256), (256, 512), (320, 320)]):
        Image.new("RGB", size, (40 * index, 90, 200)).save(folder / f"img{index}.png")
        if index < 3:
            (folder / f"img{index}.txt").write_text(f"a boat, tag{index}\n", encoding="utf-8")
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A client that holds the token and sends what the page sends."""
    home = tmp_path / "home"
    home.mkdir()
    made = app.create(home, TOKEN, PORT)
    headers = {"authorization": f"Bearer {TOKEN}", "x-studio": "1"}
    with TestClient(made, base_url=ADDRESS, headers=headers) as client:
        yield client


@pytest.fixture
def opened(client: TestClient, photos: Path) -> str:
    """The folder of pictures, chosen."""
    return client.post("/api/choose", json={"path": str(photos)}).json()["folder"]


@pytest.fixture
def wait() -> Callable[..., dict[str, Any]]:
    """Wait until a job has ended; gives it as the page would see it."""

    def until(client: TestClient, job: dict[str, Any], seconds: float = 240) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = client.get("/api/output", params={"job": job["id"]}).json()
            if found["state"] not in {"queued", "running"}:
                return found
            time.sleep(0.1)
        raise AssertionError(f"still {found['state']}: {json.dumps(found)[-2000:]}")

    return until
