"""Parquet files at any address: the same records as of the files here, copied once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from handmade import encoded
from PIL import Image

from sdxl_trainer.config import Data
from sdxl_trainer.data.sources import dataset, records, tables
from sdxl_trainer.errors import UserError

PICTURES = [encoded(Image.new("RGB", (4 + index, 4))) for index in range(250)]


def written(place: Any, first: int, last: int, **columns: Any) -> None:
    images = [{"bytes": content, "path": None} for content in PICTURES[first:last]]
    texts = [f"caption {index}" for index in range(first, last)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": texts} | columns), place)


@pytest.fixture
def bucket() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    for name, first, last in (("a", 0, 230), ("b", 230, 250)):
        with system.open(f"/tables/{name}.parquet", "wb") as file:
            written(file, first, last)
    yield system
    system.rm("/tables", recursive=True)


def read(place: Path, path: str = "memory://tables", **options: Any) -> list[tuple[bytes, tuple[str, ...]]]:
    found = records(Data(path=path, **options), seed=0, where="data.0.path", datasets_dir=str(place))
    return [(record.read(), record.captions) for record in found]


def test_the_rows_of_all_files_in_their_order(bucket: Any, tmp_path: Path) -> None:
    expected = [(content, (f"caption {index}",)) for index, content in enumerate(PICTURES)]
    assert read(tmp_path) == expected
    assert read(tmp_path, "memory://tables/b.parquet") == expected[230:]


def test_a_file_is_copied_once_and_again_when_it_changes(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    copy = tables._copy
    monkeypatch.setattr(tables, "_copy", lambda address, *more: (copied.append(address), copy(address, *more)))
    first = read(tmp_path)
    assert read(tmp_path) == first
    assert copied == ["memory:///tables/a.parquet", "memory:///tables/b.parquet"]
    with bucket.open("/tables/b.parquet", "wb") as file:
        written(file, 230, 240)
    assert read(tmp_path) == first[:240]
    assert copied[2:] == ["memory:///tables/b.parquet"]


def test_few_rows_are_in_memory_at_a_time(bucket: Any, tmp_path: Path) -> None:
    read(tmp_path)
    lengths = [len(b) for p in tmp_path.rglob("*.arrow") for b in pyarrow.ipc.open_stream(pyarrow.memory_map(str(p)))]
    assert max(lengths) <= tables.BATCH
    assert sum(lengths) == 250
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "content", "options", "what"),
    [
        ("c.parquet", b"PAR1 nothing PAR1", {}, "c.parquet cannot be copied"),
        ("c.tar", b"\0" * 10240, {}, "both .tar shards and parquet files"),
        ("c.txt", b"", {"split": "test"}, "no split 'test'"),
        ("c.txt", b"", {"image_column": "photo"}, "no column 'photo'; columns: image, text"),
        ("c.txt", b"", {"folder": "sub"}, "'folder' has no effect"),
        ("c.txt", b"", {"mask": "file"}, "'mask' has no effect"),
    ],
)
def test_bad_files(bucket: Any, tmp_path: Path, name: str, content: bytes, options: dict[str, Any], what: str) -> None:
    bucket.pipe(f"/tables/{name}", content)
    with pytest.raises(UserError, match=what):
        read(tmp_path, **options)


def test_a_damaged_copy_is_named(bucket: Any, tmp_path: Path) -> None:
    read(tmp_path)
    dataset.arrow.cache_clear()  # as another process would find it
    for path in tmp_path.rglob("*.arrow"):
        path.unlink()
        path.write_bytes(b"nothing at all")
    with pytest.raises(UserError, match="the copy of a parquet file is damaged") as caught:
        read(tmp_path)
    assert caught.value.fix.startswith("delete it")
