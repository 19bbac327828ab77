"""A cache at an address: the same rows, bit by bit; what it lacks is encoded here; what fails is said in words."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from served import serving

from sdxl_trainer import addresses, check, files, inspect_cache
from sdxl_trainer import base as bases
from sdxl_trainer.data import cache, mirrored, prepare
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.errors import UserError
from sdxl_trainer.train import train

BUCKET = "memory://bucket/cache"
ROWS = {f"row{i}": torch.full((8, 4, 4), float(i)).half() for i in range(6)}


class Shaky(MemoryFileSystem):
    """A service that refuses the next requests for parts of files, and notes those that it answers."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[Exception]] = []
    asked: ClassVar[list[str]] = []

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        self.asked.append(path)
        return super().cat_file(path, start, end, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self.asked.append(rpath)
        super().get_file(rpath, lpath, **kwargs)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; whatever is tried again is tried at once."""
    monkeypatch.setattr(addresses, "WAITS", (0, 0, 0))
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    Shaky.store.clear()
    Shaky.failures.clear()
    Shaky.asked.clear()
    yield BUCKET.replace("memory", "shaky")
    Shaky.store.clear()


def filled(folder: Path, rows: dict[str, torch.Tensor]) -> Path:
    cache.write_shard(folder / "latents", rows, {})
    return folder


def push(folder: Path, address: str) -> tuple[int, int]:
    return mirrored.push(folder, address, open_memo(folder), lambda *_: None)


def latents(folder: Path, address: str) -> cache.Store:
    return mirrored.open_stores(folder, address)[0]


def test_rows_come_back_bitwise_and_a_second_start_reads_no_header(bucket: str, tmp_path: Path) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    store = latents(tmp_path / "two", bucket)
    assert all(torch.equal(store.get(name), row) for name, row in ROWS.items())
    assert ("row0" in store, "other" in store, len(store)) == (True, False, 0)
    with pytest.raises(KeyError):
        store.get("other")
    assert not list((tmp_path / "two").rglob("*.safetensors"))
    Shaky.asked.clear()
    again = latents(tmp_path / "two", bucket)
    assert Shaky.asked == [], "neither the table nor a header"
    assert torch.equal(again.get("row3"), ROWS["row3"])
    assert len(Shaky.asked) == 1


def test_only_the_row_s_bytes_are_read(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    store, parts, part = latents(tmp_path / "two", bucket), [], addresses.part
    monkeypatch.setattr(addresses, "part", lambda a, b, e, w: parts.append(e - b) or part(a, b, e, w))
    store.get("row1")
    assert parts == [8 * 4 * 4 * 2]


def test_pushing_copies_what_is_new_and_what_was_cut_short(bucket: str, tmp_path: Path) -> None:
    one = filled(tmp_path / "one", ROWS)
    assert push(one, bucket)[0] == 1
    assert push(one, bucket) == (0, 0)
    filled(one, {"more": torch.ones(3)})
    assert push(one, bucket)[0] == 1
    system, path = fsspec.core.url_to_fs(f"{bucket}/latents")
    short = system.ls(path, detail=False)[0]
    system.pipe_file(short, system.cat_file(short)[:-1])
    assert push(one, bucket)[0] == 1
    assert mirrored.damaged(one, bucket, lambda *_: None) == (2, [])


def test_writers_side_by_side(bucket: str, tmp_path: Path) -> None:
    """The table at the address is the last one's: what it lacks is found all the same, and the next one mends it."""
    one, two = filled(tmp_path / "one", ROWS), filled(tmp_path / "two", {"b": torch.ones(2), "row0": ROWS["row0"]})
    push(one, bucket)
    system, path = fsspec.core.url_to_fs(f"{bucket}/latents.index")
    table = system.cat_file(path)
    push(two, bucket)
    system.pipe_file(path, table)  # as if the first had been slower
    reader = latents(tmp_path / "three", bucket)
    assert torch.equal(reader.get("b"), torch.ones(2))
    assert torch.equal(reader.get("row5"), ROWS["row5"])
    push(filled(tmp_path / "four", {"c": torch.ones(1)}), bucket)
    Shaky.asked.clear()
    last = latents(tmp_path / "five", bucket)
    assert len(Shaky.asked) == 1, "the table alone, which names all"
    assert all(name in last for name in (*ROWS, "b", "c"))


def test_without_a_table_headers_are_read(bucket: str, tmp_path: Path, caplog: Any) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    system, path = fsspec.core.url_to_fs(f"{bucket}/latents.index")
    system.pipe_file(path, b"nothing")
    assert torch.equal(latents(tmp_path / "two", bucket).get("row2"), ROWS["row2"])
    assert "is damaged: the shards' own headers are read" in caplog.text
    system.rm(path)
    assert torch.equal(latents(tmp_path / "three", bucket).get("row2"), ROWS["row2"])


def test_a_damaged_row_is_named_and_not_used_again(bucket: str, tmp_path: Path) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    push(filled(tmp_path / "one", {"b": torch.ones(2)}), bucket)
    system, path = fsspec.core.url_to_fs(f"{bucket}/latents")
    store = latents(tmp_path / "two", bucket)
    name = store.beyond.shards[int(store.beyond.table.columns["shard"][store.beyond.table.place("b")])]
    whole = system.cat_file(f"{path}/{name}")
    system.pipe_file(f"{path}/{name}", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="a row of the cache is damaged") as caught:
        store.get("b")
    assert caught.value.where == f"{bucket}/latents/{name}"
    assert f"into {tmp_path / 'two'}" in caught.value.fix
    again = latents(tmp_path / "two", bucket)
    assert ("b" in again, "row0" in again) == (False, True)
    assert torch.equal(again.get("row0"), ROWS["row0"])
    assert mirrored.damaged(tmp_path / "two", bucket, lambda *_: None)[1] == [f"{bucket}/latents/{name}"]
    system.rm(f"{path}/{name}")
    push(tmp_path / "one", bucket)
    assert mirrored.damaged(tmp_path / "two", bucket, lambda *_: None) == (2, [])
    assert torch.equal(latents(tmp_path / "two", bucket).get("b"), torch.ones(2))


def test_a_byte_that_changed_on_its_way_is_read_again(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    store, part, masks = latents(tmp_path / "two", bucket), addresses.part, [0, 1]
    monkeypatch.setattr(addresses, "part", lambda *a: (whole := part(*a))[:-1] + bytes([whole[-1] ^ masks.pop()]))
    assert torch.equal(store.get("row4"), ROWS["row4"])
    assert not masks


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_shard_that_is_not_whole_yet_is_left_out(bucket: str, tmp_path: Path, keep: int, caplog: Any) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    path = cache.write_shard(tmp_path / "far", {"b": torch.ones(2)}, {})
    system, root = fsspec.core.url_to_fs(f"{bucket}/latents")
    system.pipe_file(f"{root}/{path.name}", path.read_bytes()[:keep])
    store = latents(tmp_path / "two", bucket)
    assert ("b" in store, "row0" in store) == (False, True)
    assert f"{path.name} is not used: the file is cut short" in caplog.text
    system.pipe_file(f"{root}/{path.name}", path.read_bytes())
    assert "b" in latents(tmp_path / "two", bucket)


class Refused(Exception):
    """What a library of a cloud may raise: it has a status, and no base class of ours."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    "error", [ConnectionResetError("cut"), TimeoutError("late"), Refused(503), Refused(429)], ids=str
)
def test_what_may_pass_is_tried_again(bucket: str, tmp_path: Path, error: Exception) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    store = latents(tmp_path / "two", bucket)
    Shaky.failures += [error] * 3
    assert torch.equal(store.get("row4"), ROWS["row4"])
    Shaky.failures += [error] * 4
    with pytest.raises(UserError, match="does not answer, tried 4 times") as caught:
        store.get("row4")
    assert caught.value.where == f"cache.mirror = '{bucket}'"
    assert "the same command goes on" in caught.value.fix


@pytest.mark.parametrize("error", [PermissionError("no"), Refused(403)], ids=str)
def test_what_does_not_pass_is_told_at_once(bucket: str, tmp_path: Path, error: Exception) -> None:
    push(filled(tmp_path / "one", ROWS), bucket)
    store = latents(tmp_path / "two", bucket)
    Shaky.failures += [error]
    with pytest.raises(UserError, match="access is denied") as caught:
        store.get("row4")
    assert "credentials" in caught.value.fix
    assert Shaky.failures == []


def test_a_mistake_of_ours_is_not_taken_for_the_network_s(bucket: str) -> None:
    with pytest.raises(ZeroDivisionError):
        addresses.asked(lambda: 1 / 0, bucket, "here")


@pytest.mark.parametrize(
    ("address", "what", "fix"),
    [
        ("shaky://nothing/here", "there is no cache at this address", "--push fills it"),
        ("nosuch://bucket", "cannot be opened: Protocol not known", "spelling"),
        ("abfs://container/cache", "cannot be opened: Install", "pip install"),
    ],
)
def test_bad_addresses(bucket: str, tmp_path: Path, address: str, what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        latents(tmp_path, address)
    assert fix in caught.value.fix
    assert caught.value.where == f"cache.mirror = '{address}'"


def test_the_cache_is_not_its_own_mirror(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the cache itself"):
        latents(tmp_path, str(tmp_path))


def test_a_bucket_that_is_missing_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Buckets(MemoryFileSystem):
        protocol = ("s3", "s3a")
        store: ClassVar[dict[str, Any]] = {}

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            raise AssertionError("a bucket was made")

        def put_file(self, *_: Any, **__: Any) -> None:
            raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Buckets)
    with pytest.raises(UserError, match="cannot be written: its bucket is not there") as caught:
        push(filled(tmp_path / "one", ROWS), "s3://bukcet/cache")
    assert "make it first" in caught.value.fix


def test_nothing_is_written_to_web_servers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing can be written to a web server"):
        push(tmp_path, "https://host/cache")


def test_a_damaged_shard_is_not_pushed(bucket: str, tmp_path: Path) -> None:
    path = cache.write_shard(filled(tmp_path / "one", ROWS) / "latents", {"b": torch.ones(2)}, {})
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match="is damaged") as caught:
        push(tmp_path / "one", bucket)
    assert caught.value.where == str(path)


def test_a_web_server_without_lists_of_its_folders(tmp_path: Path) -> None:
    push(filled(tmp_path / "one", ROWS), str(tmp_path / "served" / "cache"))
    with serving(tmp_path / "served") as address:
        store = latents(tmp_path / "two", f"{address}/cache")
        assert all(torch.equal(store.get(name), row) for name, row in ROWS.items())
    with serving(tmp_path / "served", ranges=False) as address:
        whole = latents(tmp_path / "three", f"{address}/cache")
        with pytest.raises(UserError, match="sends the whole file where a part of it is asked for"):
            whole.get("row1")


def run(config: Callable[..., Any], tmp_path: Path, name: str, **more: Any) -> Any:
    return config(output_dir=str(tmp_path / name), cache={"path": str(tmp_path / f"cache of {name}")}, **more)


def result(output: Path) -> tuple[list[Any], dict[str, str]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = files.tree_hashes(output / "unet")
    return [(row["loss"], row["grad_norm"]) for row in rows], {n: h for n, h in weights.items() if "tensors" in n}


def far(made: Any, address: str) -> Any:
    return made.model_copy(update={"cache": made.cache.model_copy(update={"mirror": address})})


def test_a_run_from_the_mirror_is_that_from_the_cache(
    config: Callable[..., Any], bucket: str, tmp_path: Path, capfd: Any
) -> None:
    """Also over HTTP; nothing is encoded, no shard is made, and check and --verify know of it."""
    options: dict[str, Any] = {"data": [{"crop": "random", "flip": True}], "train": {"steps": 2}}
    near = run(config, tmp_path, "near", **options)
    expected = result(train(near))
    web = str(tmp_path / "served" / "cache")
    for address in (bucket, web):
        inspect_cache.run(far(near, address), verify=False, gc=False, push=True)
    said = capfd.readouterr().err
    assert "copied 2 files" in said
    assert said.count("encoded 0 latents and 0 captions") == 2
    with serving(tmp_path / "served") as server:
        for name, address in (("bucket", bucket), ("web", f"{server}/cache")):
            made = far(run(config, tmp_path, name, **options), address)
            stock = prepare.take_stock(made, bases.resolve(made.model, tmp_path), "fp32")
            assert [len(stock.missing_latents()), len(stock.missing_texts())] == [0, 0]
            assert result(train(made)) == expected
            assert not list((tmp_path / f"cache of {name}").rglob("*.safetensors"))
        check.run(made)
    assert "mirror    http://" in capfd.readouterr().out
    inspect_cache.run(far(near, bucket), verify=True, gc=False)
    assert "4 cache files" in capfd.readouterr().err


def test_what_the_mirror_lacks_is_encoded_here(
    config: Callable[..., Any], pictures: Path, bucket: str, tmp_path: Path, capfd: Any
) -> None:
    """One more picture with a caption of its own: one row of each, and only these are pushed later."""
    shutil.copytree(pictures, tmp_path / "set")
    sets: dict[str, Any] = {"data": [{"path": str(tmp_path / "set")}], "train": {"steps": 2}}
    inspect_cache.run(far(run(config, tmp_path, "one", **sets), bucket), verify=False, gc=False, push=True)
    content = (tmp_path / "set" / "0.png").read_bytes()
    (tmp_path / "set" / "9.png").write_bytes(content + b"another")
    with (tmp_path / "set" / "metadata.jsonl").open("a") as table:
        table.write(json.dumps({"file_name": "9.png", "text": "something new"}) + "\n")
    expected = result(train(run(config, tmp_path, "alone", **sets)))
    capfd.readouterr()
    made = far(run(config, tmp_path, "two", **sets), bucket)
    inspect_cache.run(made, verify=False, gc=False, push=True)
    said = capfd.readouterr().err
    assert "encoded 1 latent and 1 caption" in said
    assert "copied 2 files" in said
    assert result(train(made)) == expected


def test_what_is_known_of_pictures_comes_along(
    config: Callable[..., Any], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine neither walks the shards of a data set nor opens a picture."""
    from test_shards import PICTURES, tar

    members = {f"{i}.png": content for i, content in enumerate(PICTURES)}
    captions = {f"{i}.txt": b"a red circle" for i in range(len(PICTURES))}
    fsspec.filesystem("memory").pipe("/set/s.tar", tar(members | captions))
    sets: dict[str, Any] = {"data": [{"path": "memory://set"}], "train": {"steps": 2}}
    one = run(config, tmp_path, "one", **sets)
    inspect_cache.run(far(one, bucket), verify=False, gc=False, push=True)
    expected = result(train(one))

    touched: list[str] = []
    for name in ("_open", "cat_file", "get_file"):
        method = getattr(MemoryFileSystem, name)
        monkeypatch.setattr(
            MemoryFileSystem, name, lambda self, path, *a, m=method, **k: touched.append(path) or m(self, path, *a, **k)
        )
    two = far(run(config, tmp_path, "two", **sets), bucket)
    assert result(train(two)) == expected
    assert touched
    assert not [path for path in touched if "/set/" in path]
    fsspec.filesystem("memory").rm("/set", recursive=True)
