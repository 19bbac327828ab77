"""Bad inputs: pictures, captions, metadata and datasets."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from tests.bad_inputs.place import Bad, Place


def encoded(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims a large picture: a decompression bomb."""
    small = encoded(1, 1)
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def fresh_folder(place: Place, content: dict[str, bytes | str]) -> None:
    """Another folder of pictures: photos/."""
    (place / "photos").mkdir()
    for name, data in content.items():
        place.put(f"photos/{name}", data)
    place.set("data.0.path", "photos")


def unreadable(place: Place, name: str) -> None:
    """Root may read anything: refuse in the system's place."""
    place.picture(name, encoded(70, 70))
    read = Path.read_bytes

    def refusing(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    place.patch.setattr(Path, "read_bytes", refusing)


def closed_folder(place: Place) -> None:
    (place / "pictures/closed").mkdir()
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    place.patch.setattr(os, "scandir", refusing)


def linked(place: Place, name: str, target: str) -> None:
    (place / "pictures" / name).symlink_to(target)


def captionless(place: Place) -> None:
    place.remove("pictures/metadata.jsonl")


def table(place: Place, name: str, content: bytes | str) -> None:
    """Another metadata file in place of metadata.jsonl."""
    place.remove("pictures/metadata.jsonl")
    place.put(f"pictures/{name}", content)


def saved_dataset(place: Place, **columns: Any) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(place / "saved")
    place.set("data.0.path", "saved")


def gone_after_the_look(place: Place) -> None:
    """A picture that disappears after its size was read."""
    from sdxl_trainer.data import prepare

    place.picture("late.png", encoded(70, 70))
    look = prepare.load

    def removing(*arguments: Any) -> Any:
        pictures = look(*arguments)
        place.remove("pictures/late.png")
        return pictures

    place.patch.setattr(prepare, "load", removing)


NEW = {"output_dir": "new"}  # what only decoding finds: a continued run would say first that its data changed
HERE = "data.0.path = "
ROWS = [
    Bad("no data folder", "no such folder", "check the spelling", HERE, options={"data.0.path": "no/such/folder"}),
    Bad(
        "data path is a file",
        "is a file, not a folder",
        "folder",
        HERE,
        make=lambda p: p.set("data.0.path", "config.toml"),
    ),
    Bad(
        "empty folder",
        "no pictures in the folder.*found: nothing",
        "give a folder",
        HERE,
        make=lambda p: fresh_folder(p, {}),
    ),
    Bad(
        "folder of other files",
        "no pictures in the folder.*2 .pdf",
        "give a folder",
        make=lambda p: fresh_folder(p, {"a.pdf": "x", "b.pdf": "x"}),
    ),
    Bad("folder of archives", "archives: a.zip", "unpack", make=lambda p: fresh_folder(p, {"a.zip": b"PK\3\4"})),
    Bad("no captions", "6 pictures have no caption", r"\.txt file beside each", HERE, make=captionless),
    Bad(
        "empty caption",
        r"1 caption is empty: more.png \(metadata.jsonl:7\)",
        "write them",
        make=lambda p: (p.put("pictures/more.png", encoded(70, 70)), p.rows({"file_name": "more.png", "text": " "})),
    ),
    Bad(
        "empty caption file",
        "1 caption is empty: a.txt",
        "write them",
        make=lambda p: fresh_folder(p, {"a.png": encoded(70, 70), "a.txt": "\n"}),
    ),
    Bad(
        "caption file not UTF-8",
        "not UTF-8 text: a.txt",
        "UTF-8",
        make=lambda p: fresh_folder(p, {"a.png": encoded(70, 70), "a.txt": b"caf\xe9"}),
    ),
    Bad(
        "caption column wrong",
        "no column 'caption'; columns: file_name, text",
        "'?text'?",
        options={"data.0.caption_column": "caption"},
    ),
    Bad(
        "image column wrong",
        "no column 'photo'",
        "set image_column",
        make=lambda p: saved_dataset(p, image=[b"x"], text=["a"]),
        options={"data.0.image_column": "photo"},
    ),
    Bad(
        "dataset of no pictures",
        "column 'image' holds int64, not pictures",
        "image_column",
        make=lambda p: saved_dataset(p, image=[1, 2], text=["a", "b"]),
    ),
    Bad(
        "caption not a string",
        r"caption is not text: 0.png",
        "string",
        make=lambda p: table(p, "metadata.jsonl", '{"file_name": "0.png", "text": 7}\n'),
    ),
    Bad(
        "caption with half a character",
        r"caption is not text: 0.png",
        "string",
        make=lambda p: table(p, "metadata.jsonl", '{"file_name": "0.png", "text": "a \\ud83d circle"}\n'),
    ),
    Bad(
        "metadata names a missing file",
        r"do not exist: 9.png \(metadata.jsonl:7",
        "correct file_name",
        make=lambda p: p.rows({"file_name": "9.png", "text": "a"}),
    ),
    Bad(
        "file name with half a character",
        r"do not exist: a.*\(metadata.jsonl:7",
        "correct file_name",
        make=lambda p: p.rows({"file_name": "a\ud83d.png", "text": "a"}),
    ),
    Bad("metadata without file_name", "has no file_name", "path", make=lambda p: p.rows({"text": "a"})),
    Bad(
        "duplicate rows",
        r"more than one metadata row: 0.png \(metadata.jsonl:1 and metadata.jsonl:7\)",
        "keep one",
        make=lambda p: p.rows({"file_name": "0.png", "text": "again"}),
    ),
    Bad(
        "picture without a row",
        "named by no metadata row: more.png",
        "add a row",
        make=lambda p: p.put("pictures/more.png", encoded(70, 70)),
    ),
    Bad(
        "file name escapes",
        r"outside of the folder: \.\./secret.png",
        "move the pictures",
        make=lambda p: (p.put("secret.png", encoded(70, 70)), p.rows({"file_name": "../secret.png", "text": "a"})),
    ),
    Bad(
        "absolute file name",
        "outside of the folder: /etc/passwd",
        "move the pictures",
        make=lambda p: p.rows({"file_name": "/etc/passwd", "text": "a"}),
    ),
    Bad(
        "broken jsonl line",
        "metadata.jsonl cannot be read: line 7 is not JSON",
        "correct the file",
        make=lambda p: p.put("pictures/metadata.jsonl", (p / "pictures/metadata.jsonl").read_text() + "{oops\n"),
    ),
    Bad(
        "broken csv line",
        "metadata.csv cannot be read: line 2 does not have 2 values",
        "correct the file",
        make=lambda p: table(p, "metadata.csv", "file_name,text\n0.png,a red, green circle\n"),
    ),
    Bad(
        "broken parquet",
        "metadata.parquet cannot be read",
        "correct the file",
        make=lambda p: table(p, "metadata.parquet", b"PAR1" + b"\0" * 40),
    ),
    Bad(
        "two metadata files",
        "two metadata files",
        "remove one",
        make=lambda p: p.put("pictures/metadata.csv", "file_name,text\n1.png,a\n"),
    ),
    Bad(
        "truncated JPEG",
        "damaged.*truncated",
        "whole one",
        "cut.jpg",
        make=lambda p: p.picture("cut.jpg", encoded(90, 90, "JPEG")[:2000]),
        options=NEW,
    ),
    Bad("zero-byte picture", r"zero bytes\): none.png", "restore", make=lambda p: p.picture("none.png", b"")),
    Bad(
        "text called .jpg",
        "not a picture",
        "replace",
        "words.jpg",
        make=lambda p: p.picture("words.jpg", b"These are words."),
    ),
    Bad(
        "web page called .jpg",
        "a web page",
        "download the picture",
        "page.jpg",
        make=lambda p: p.picture("page.jpg", b"<html>404</html>"),
    ),
    Bad(
        "1x1 picture",
        "1 x 1 pixels would be enlarged 64 times",
        "larger picture",
        "dot.png",
        make=lambda p: p.picture("dot.png", encoded(1, 1)),
    ),
    Bad(
        "30,000 pixels wide",
        "30000 x 64 pixels is more than 16 times",
        "crop",
        "wide.png",
        make=lambda p: p.picture("wide.png", encoded(30_000, 64)),
    ),
    Bad(
        "decompression bomb",
        "more than 179 million pixels",
        "smaller",
        "bomb.png",
        make=lambda p: p.picture("bomb.png", claiming(60_000, 60_000)),
    ),
    Bad(
        "header larger than the file",
        "damaged",
        "whole one",
        "big.png",
        make=lambda p: p.picture("big.png", claiming(300, 300)),
        options=NEW,
    ),
    Bad(
        "many bad pictures",
        "2 pictures cannot be used",
        "",
        r"words.jpg \(.*, dot.png \(",
        make=lambda p: (p.picture("dot.png", encoded(1, 1)), p.picture("words.jpg", b"words")),
    ),
    Bad(
        "unreadable picture",
        "cannot be read: Permission denied",
        "readable",
        "closed.png",
        make=lambda p: unreadable(p, "closed.png"),
    ),
    Bad("unreadable folder", r"cannot be read: closed/ \(Permission denied\)", "chmod", make=closed_folder),
    Bad(
        "picture gone meanwhile",
        "cannot be read: No such file",
        "restore",
        "late.png",
        make=gone_after_the_look,
        options=NEW,
    ),
    Bad("symlink loop", "leads in a circle: loop.png", "remove", make=lambda p: linked(p, "loop.png", "loop.png")),
    Bad("folder symlink loop", "leads in a circle: again", "remove", make=lambda p: linked(p, "again", ".")),
    Bad(
        "dangling symlink", "leads nowhere: nowhere.png", "restore", make=lambda p: linked(p, "nowhere.png", "gone.png")
    ),
    Bad(
        "symlink out of the folder",
        "leads out of the folder: out.png",
        "copy",
        make=lambda p: (p.put("secret.png", encoded(70, 70)), linked(p, "out.png", "../secret.png")),
    ),
    Bad("unknown split", "no split 'tset'", "put the pictures of the split there", options={"data.0.split": "tset"}),
    Bad(
        "hub dataset not reachable",
        "cannot be fetched from the hub",
        "network",
        options={"data.0.path": "nobody/nothing-there"},
    ),
    Bad(
        "saved dataset damaged",
        "saved dataset cannot be opened",
        "save or copy",
        make=lambda p: (saved_dataset(p, image=[b"x"], text=["a"]), p.put("saved/state.json", "{")),
    ),
    Bad(
        "rows of a dataset cut short",
        "saved dataset cannot be opened",
        "save or copy",
        make=lambda p: (saved_dataset(p, image=[b"x" * 5000], text=["a"]), p.cut("saved/data-00000-of-00001.arrow")),
    ),
]
