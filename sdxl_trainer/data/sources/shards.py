"""Records of WebDataset shards: .tar files, here or at any address that fsspec opens (s3://, gs://, https://, ...).

Files of one sample have one name up to its first dot: 000.jpg, 000.txt, 000.json. A shard is walked once; where its
files lie is kept in the cache, and a picture is then read by itself. At no time is more than one picture in memory.
"""

import hashlib
import json
import logging
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_trainer import addresses, files
from sdxl_trainer.config import Data
from sdxl_trainer.data.problems import Found, Notes, refuse, total
from sdxl_trainer.data.records import Lasting, Mask, Record
from sdxl_trainer.data.sources import extras
from sdxl_trainer.data.sources.addresses import File
from sdxl_trainer.data.sources.tree import CAPTIONS, PICTURES
from sdxl_trainer.errors import UserError, plural

log = logging.getLogger("sdxl_trainer")
TEXTS = (*CAPTIONS, ".json")
PROBLEMS = {
    "twice": ("samples have more than one picture", "keep one picture for each name up to the first dot"),
    "unreadable": ("text files are not UTF-8, or not JSON", "pack the shard once more"),
    "type": ("captions are not text", "write each caption as a string or a list of strings"),
    "uncaptioned": ("samples have no caption", "pack a .txt or .json with each, or give 'caption' for all of them"),
} | extras.PROBLEMS
# Per sample: its name, its picture's [suffix, offset, size] for each picture, and its texts by suffix.
Sample = tuple[str, list[tuple[str, int, int]], dict[str, str | None]]


def records(data: Data, found: list[File], place: str, index_dir: Path | None, notes: Notes | None = None) -> Lasting:
    """The samples of all shards, in their order."""
    return Lasting([data.model_dump(mode="json")], found, partial(_rows, data, found, place, index_dir, notes))


def _rows(
    data: Data, found_shards: list[File], place: str, index_dir: Path | None, notes: Notes | None
) -> Iterator[Record]:
    problems: Found = defaultdict(list)
    found, alone, unusable, told = 0, 0, 0, False
    for shard, stamp in found_shards:
        for name, pictures, texts in _index(shard, stamp, place, index_dir):
            told |= any(suffix in texts for suffix in CAPTIONS)
            label = f"{shard.rsplit('/', 1)[-1]}/{name}"
            before = total(problems)
            if not pictures:
                alone += 1
                continue
            if len(pictures) > 1:
                problems["twice"].append(label)
            record = _record(data, shard, stamp, label, pictures[0], texts, problems)
            if total(problems) == before:
                found += 1
                yield record
            else:
                unusable += 1
    refuse(problems, PROBLEMS, place, notes)
    if notes is not None:
        notes.unusable[place] += unusable
        notes.skipped[place]["samples without a picture"] += alone
    if data.caption_per_line and not told:
        raise UserError("caption_per_line has no effect: there are no caption files", place, "remove it")
    if not found and not unusable:
        raise UserError("the shards hold no pictures", place, f"pack pictures ({' '.join(sorted(PICTURES))}) in them")
    log.info("%s: %d pictures; samples without a picture: %d", place, found, alone)


def read(shard: str, offset: int, size: int, name: str) -> bytes:
    """The bytes of one picture. UserError names it if they cannot be read any more."""
    content = addresses.part(shard, offset, offset + size, name)
    if len(content) != size:
        raise UserError("the shard is shorter than it was", name, "restore the shard")
    return content


def _index(shard: str, stamp: str, place: str, index_dir: Path | None) -> list[Sample]:
    """What a shard holds, from the cache if it was walked before."""
    known = index_dir / f"{hashlib.sha256(f'1 {shard} {stamp}'.encode()).hexdigest()[:32]}.json" if index_dir else None
    if known and known.is_file():
        try:
            return [
                (name, [tuple(p) for p in pictures], texts) for name, pictures, texts in json.loads(known.read_bytes())
            ]
        except ValueError:
            log.info("%s is damaged: the shard is walked once more", known)

    def walk() -> list[Sample]:
        system, path = addresses.opened(shard, place)
        with system.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            found = _walk(tar)
            _refuse_open_end(tar, stream, shard, place)
            return found

    try:
        samples = addresses.asked(walk, shard, place)
    except tarfile.TarError as error:
        raise UserError(f"the shard {shard} cannot be read: {error}", place, "download or pack it once more") from None
    if known:
        files.write_json(known, samples)
    return samples


def _refuse_open_end(tar: tarfile.TarFile, stream: Any, shard: str, place: str) -> None:
    """The library takes a shard that is cut short between two files, or damaged there, for one that ends."""
    stream.seek(tar.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        what = f"the shard {shard} is cut short or damaged after {plural(len(tar.getmembers()), 'file')}"
        raise UserError(what, place, "download or pack it once more")


def _walk(tar: tarfile.TarFile) -> list[Sample]:
    found: dict[str, Sample] = {}
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, _, rest = base.partition(".")
        if not member.isfile() or not stem:
            continue
        name, suffix = (f"{folder}/{stem}" if folder else stem), f".{rest.lower()}"
        _, pictures, texts = found.setdefault(name, (name, [], {}))
        if suffix in PICTURES:
            pictures.append((suffix, member.offset_data, member.size))
        elif suffix in TEXTS:
            content = tar.extractfile(member)
            try:
                texts[suffix] = content.read().decode("utf-8-sig") if content else None
            except UnicodeDecodeError:
                texts[suffix] = None
    return list(found.values())


def _record(
    data: Data,
    shard: str,
    stamp: str,
    name: str,
    picture: tuple[str, int, int],
    texts: dict[str, str | None],
    problems: dict[str, list[str]],
) -> Record:
    _, offset, size = picture
    values = _values(texts, name, problems)
    captions = _captions(data, texts, values, name, problems)
    record = Record(name, captions, partial(read, shard, offset, size, name), f"{stamp}:{offset}")
    mask = Mask(name, record.read, record.stamp) if data.mask == "alpha" else None
    point = extras.focus(values.get(data.focus_column), name, problems) if data.focus == "column" else None
    seconds: tuple[str, ...] = ()
    if data.caption_column_2 is not None:
        second = values.get(data.caption_column_2)
        seconds = extras.seconds(second, captions or None, captions, name, problems)
    return replace(record, mask=mask, focus=point, seconds=seconds)


def _captions(
    data: Data, texts: dict[str, str | None], values: dict[str, Any], name: str, problems: dict[str, list[str]]
) -> tuple[str, ...]:
    """From the text file, else from the JSON file, else the one for all."""
    written: object = next((texts[suffix] for suffix in CAPTIONS if suffix in texts), None)
    if isinstance(written, str) and data.caption_per_line:
        written = [line for line in written.split("\n") if line.strip()]
    if written is None:
        written = extras.in_json(data, values)
    captions = extras.clean(written)
    if not captions and captions is not None and data.caption is not None:
        captions = (data.caption.strip(),)
    if not captions:
        problems["type" if captions is None else "uncaptioned"].append(name)
    return captions or ()


def _values(texts: dict[str, str | None], name: str, problems: dict[str, list[str]]) -> dict[str, Any]:
    """The sample's JSON file; a problem is noted for a text that cannot be read."""
    try:
        values = json.loads(texts.get(".json") or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict) or None in texts.values():
        problems["unreadable"].append(name)
        return {}
    return values
