"""A cache at any address that fsspec opens: rows are read from it one by one, and `sdxl cache --push` fills it.

Nothing there is ever changed: shards are named by their hashes, so that writers cannot be in each other's way, and of
the tables of shards, which several may write, the last one stays. What a table does not name is found by listing the
folder. What is known of the address is kept beside the cache here, so that a second start reads no header.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from sdxl_trainer import addresses, files
from sdxl_trainer.data import cache
from sdxl_trainer.data.cache import COLUMNS, Described, Store
from sdxl_trainer.data.memo import Memo
from sdxl_trainer.data.table import opened
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import header
from sdxl_trainer.threads import mapped

log = logging.getLogger("sdxl_trainer")
KINDS = ("latents", "texts")
FACTS = "pictures.table"  # hashes and sizes of pictures, by stamp
WALKS = "shards"  # what lies where in tar files
# Requests at a time. What counts is how long an answer takes, not how much it holds.
AT_ONCE = 32
WHOLE = 8  # whole files at a time
UNKNOWN: addresses.File = (None, addresses.stamp({}))


@dataclass
class Mirrored(Store):
    """The rows of one folder of shards at an address. `folder` names what is kept of it here."""

    TRIES: ClassVar[int] = 2  # on its way here, too, a byte may change
    LASTING: ClassVar[bool] = False
    AT_ONCE: ClassVar[int] = AT_ONCE

    address: str = ""
    near: Path = Path()  # a folder here that may hold the same shards
    left_out: dict[str, str] = field(default_factory=dict)  # shards not to be used, with the stamp of each
    found: dict[str, addresses.File] = field(default_factory=dict)  # the files there at the last look
    trouble: UserError | None = None  # why a web server did not list them

    @property
    def where(self) -> str:
        return _where(self.address.rpartition("/")[0])

    def read_into(self, buffer: memoryview, name: str, begin: int) -> int:
        try:
            content = addresses.part(f"{self.address}/{name}", begin, begin + len(buffer), self.where)
        except addresses.Gone:
            raise self.spoiled(name, "a file of the cache's mirror is gone") from None
        buffer[: len(content)] = content
        return len(content)

    def spoiled(self, name: str, what: str) -> UserError:
        """Nothing at the address is changed: it is noted here that the shard is not to be used while it is as it is."""
        self.look()  # what is wrong may be newer than the last look
        self._leave_out(name)
        fix = (
            f"nothing is changed there: run the same command, which encodes anew what it held, into {self.near.parent}"
        )
        return UserError(what, f"{self.address}/{name}", fix)

    def there(self) -> list[str]:
        return sorted(name for name, (_, stamp) in self.look().items() if self.left_out.get(name) != stamp)

    def headers(self, names: Sequence[str]) -> dict[str, list[Described]]:
        """A shard that is no whole file is left out: it may be on its way there."""
        found: dict[str, list[Described]] = {}
        for number, rows in mapped(lambda n: self._header(names[n]), range(len(names)), AT_ONCE, AT_ONCE):
            if isinstance(rows, UserError):
                log.warning("%s/%s is not used: %s", self.address, names[number], rows.what)
                self._leave_out(names[number])
            else:
                found[names[number]] = rows
        return found

    def forget(self, gone: set[str]) -> None:
        """The rest is not read anew, which would be a request for each shard."""
        alive = np.array([name not in gone for name in self.shards], dtype=bool)
        kept = alive[self.table.columns["shard"]]
        self.table.columns = {name: column[kept] for name, column in self.table.columns.items()}
        self.table.columns["shard"] = (np.cumsum(alive) - 1).astype("<i4")[self.table.columns["shard"]]
        self.shards = [name for name in self.shards if name not in gone]

    def load(self) -> None:
        """Take the table at the address, or what was kept of it if it is the same still."""
        far, kept = f"{self.address}.index", self.folder.with_suffix(".stamp")
        stamp = addresses.stamped(far, self.where)
        if stamp is not None and not (self.index.is_file() and kept.is_file() and kept.read_text() == stamp):
            with files.explained(self.index):
                files.write_atomically(self.index, lambda draft: addresses.fetch(far, draft, self.where))
                files.write_text(kept, stamp)
            if not opened(self.index, COLUMNS).notes:
                log.warning("%s is damaged: the shards' own headers are read instead", far)
        self.left_out = self._noted()
        super().load()

    @property
    def _notes(self) -> Path:
        return self.folder.with_suffix(".left-out.json")

    def _noted(self) -> dict[str, str]:
        return json.loads(self._notes.read_bytes()) if self._notes.is_file() else {}

    def _leave_out(self, name: str) -> None:
        self.left_out = {**self._noted(), name: self.found.get(name, UNKNOWN)[1]}
        files.write_json(self._notes, self.left_out)

    def look(self) -> dict[str, addresses.File]:
        """The shards that there are. Web servers need not list their folders: what they do not list the table names."""
        web, found = self.address.startswith(("http://", "https://")), None
        try:
            found = addresses.listed(self.address, self.where)
        except UserError as error:
            if not web:
                raise
            self.trouble = error
        there = {name: file for name, file in (found or {}).items() if name.endswith(".safetensors")}
        self.found = dict.fromkeys(self.shards, UNKNOWN) | there if web else there
        return self.found

    def _header(self, name: str) -> list[Described] | UserError:
        here, far = self.near / name, f"{self.address}/{name}"
        if here.is_file():
            return cache.described(here)
        try:
            size = self.found.get(name, UNKNOWN)[0]
            told = header.parsed(lambda a, b: addresses.part(far, a, b, self.where), size, far, cache.AGAIN)
            rows = cache.described_by(*told, far)
        except addresses.Gone as error:
            return error
        except UserError as error:
            if error.where != far:  # the address does not answer
                raise
            return error
        if any(total == -1 for *_, total in rows):
            return UserError("its rows have no checksums", far, cache.AGAIN)
        return rows


def _where(address: str) -> str:
    return f"cache.mirror = '{address}'"


def place(folder: Path, address: str) -> Path:
    """Where it is kept, in a cache folder, what is known of an address."""
    return folder / "mirror" / hashlib.sha256(address.encode()).hexdigest()[:16]


def at(folder: Path, address: str, kind: str) -> Mirrored:
    """The shards of one kind at an address, beside the cache in `folder`; nothing is asked yet."""
    return Mirrored(place(folder, address) / kind, address=f"{address.rstrip('/')}/{kind}", near=folder / kind)


def known(folder: Path, address: str) -> bool:
    """Whether there is a cache at an address."""
    return any(at(folder, address, kind).look() for kind in KINDS)


def size(stores: Sequence[Store]) -> tuple[int, int]:
    """Rows and shards of what lies beyond stores."""
    far = [store.beyond for store in stores if store.beyond is not None]
    return sum(len(store) for store in far), sum(len(store.shards) for store in far)


def open_stores(folder: Path, address: str | None) -> tuple[Store, Store]:
    """The latents and the texts of a cache folder, and of a mirror if it has one. UserError if there is nothing."""
    if address is None:
        return cache.open_store(folder / KINDS[0]), cache.open_store(folder / KINDS[1])
    if Path(address).expanduser().absolute() == folder.absolute():
        raise UserError("the mirror of the cache is the cache itself", _where(address), "give another folder")
    beyond = [at(folder, address, kind) for kind in KINDS]
    for store in beyond:
        cache.looked_over(store)
    if not any(store.shards for store in beyond):
        fix = "check the spelling; sdxl cache CONFIG.toml --push fills it; or remove cache.mirror"
        nothing = UserError("there is no cache at this address", _where(address), fix)
        raise next((store.trouble for store in beyond if store.trouble), nothing)
    latents, texts = (cache.open_store(folder / kind, store) for kind, store in zip(KINDS, beyond, strict=True))
    return latents, texts


def take_in(folder: Path, address: str, memo: Memo) -> None:
    """Bring here what the mirror knows of pictures and tar files at addresses: it need not be found out again."""
    where, root = _where(address), address.rstrip("/")
    kept = place(folder, address) / FACTS
    stamp = addresses.stamped(f"{root}/{FACTS}", where)
    if stamp is not None and not (kept.is_file() and kept.read_text() == stamp):
        copy = kept.with_suffix(".copy")
        files.write_atomically(copy, lambda draft: addresses.fetch(f"{root}/{FACTS}", draft, where))
        memo.take_in(copy)
        copy.unlink()
        files.write_text(kept, stamp)
    try:
        walks = addresses.listed(f"{root}/{WALKS}", where) or {}
    except UserError:  # a web server without pages of its folders
        walks = {}
    new = [name for name in sorted(walks) if name.endswith(".json") and not (folder / WALKS / name).exists()]

    def bring(number: int) -> None:
        far, here = f"{root}/{WALKS}/{new[number]}", folder / WALKS / new[number]
        files.write_atomically(here, lambda draft: addresses.fetch(far, draft, where))

    for _ in mapped(bring, range(len(new)), AT_ONCE, AT_ONCE):
        pass


def push(folder: Path, address: str, memo: Memo, progress: Callable[[int, int, str], None]) -> tuple[int, int]:
    """Copy to an address what it lacks of a cache: shards, each compared with its name before and its length after,
    their tables, and what is known of pictures and tar files. Gives how many shards, and their bytes."""
    root, where = address.rstrip("/"), _where(address)
    if root.startswith(("http://", "https://")):
        raise UserError("nothing can be written to a web server", where, "give the bucket's or folder's own address")
    work: list[tuple[Path, str]] = []
    far = {kind: at(folder, address, kind) for kind in KINDS}
    for kind, store in far.items():
        there = store.look()
        for path in sorted((folder / kind).glob("*.safetensors")):
            if there.get(path.name, UNKNOWN)[0] != path.stat().st_size:
                work.append((path, f"{root}/{kind}/{path.name}"))

    def copy(number: int) -> None:
        path, target = work[number]
        if not cache.is_whole(path):
            what = "a file of the cache is damaged: its bytes are not those that were written"
            raise UserError(what, str(path), "delete it and run the same command, which encodes it anew")
        addresses.put(path, target, where)

    for done, _ in mapped(copy, range(len(work)), WHOLE, WHOLE):
        progress(done + 1, len(work), "files")
    for store in far.values():
        if cache.looked_over(store).shards:
            addresses.put(store.index, f"{store.address}.index", where)
            files.write_text(
                store.folder.with_suffix(".stamp"), addresses.stamped(f"{store.address}.index", where) or ""
            )
    _push_facts(folder, address, memo, where)
    return len(work), sum(path.stat().st_size for path, _ in work)


def _push_facts(folder: Path, address: str, memo: Memo, where: str) -> None:
    """What the mirror knows that is not known here comes first: it would be lost."""
    take_in(folder, address, memo)
    root = address.rstrip("/")
    if memo.table.is_file():
        addresses.put(memo.table, f"{root}/{FACTS}", where)
        files.write_text(place(folder, address) / FACTS, addresses.stamped(f"{root}/{FACTS}", where) or "")
    there = addresses.listed(f"{root}/{WALKS}", where) or {}
    new = [path for path in sorted((folder / WALKS).glob("*.json")) if path.name not in there]
    for _ in mapped(
        lambda n: addresses.put(new[n], f"{root}/{WALKS}/{new[n].name}", where), range(len(new)), WHOLE, WHOLE
    ):
        pass


def damaged(folder: Path, address: str, progress: Callable[[int, int, str], None]) -> tuple[int, list[str]]:
    """How many shards a mirror has, and the addresses of those whose bytes are not those that were written. All of them
    are read. What was left out and is as it should be is used again."""
    far = [at(folder, address, kind) for kind in KINDS]
    work = [(store, name) for store in far for name in sorted(store.look())]
    bad = []

    def look(number: int) -> bool:
        store, name = work[number]
        return addresses.sha256(f"{store.address}/{name}", store.where).startswith(Path(name).stem)

    for number, right in mapped(look, range(len(work)), WHOLE, WHOLE):
        if not right:
            bad.append(f"{work[number][0].address}/{work[number][1]}")
        progress(number + 1, len(work), "files")
    for store in far:
        if not any(name.startswith(f"{store.address}/") for name in bad):
            store._notes.unlink(missing_ok=True)
    return len(work), bad
