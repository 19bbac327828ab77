"""Five hundred damaged and odd inputs: nothing crashes or hangs, and every picture is trained or named."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import encoded
from PIL import Image
from test_captions import SCRIPTS

from sdxl_trainer.config import Data
from sdxl_trainer.data import captions, findings, images, sources, survey
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.data.pictures import load
from sdxl_trainer.data.problems import Notes
from sdxl_trainer.data.records import Record
from sdxl_trainer.errors import UserError

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ODD = [
    "\0",
    "\u202e",
    "\ufeff",
    "\ud800",
    "\U0001f468\u200d\U0001f469",
    "{a|b",
    "__x__",
    "((",
    "<|endoftext|>",
    "|||",
    "\n",
]


def picture(draw: random.Random) -> bytes:
    image = Image.new("RGB", (draw.randint(9, 40), draw.randint(9, 40)), tuple(draw.choices(range(256), k=3)))
    image.putpixel((3, 3), (1, 2, 3))
    return encoded(image, draw.choice(KINDS))


def damaged(draw: random.Random, whole: bytes) -> bytes:
    """Cut, changed in some bytes, with bytes put in or taken out, or repeated."""
    kind, at = draw.randrange(6), draw.randrange(len(whole))
    if kind == 0:
        return whole[:at]
    if kind == 1:
        return whole[:at] + draw.randbytes(draw.randint(1, 40)) + whole[at:]
    if kind == 2:
        return whole[:at] + whole[at + draw.randint(1, 40) :]
    if kind == 3:
        return whole + whole
    changed = bytearray(whole)
    for _ in range(draw.randint(1, 12)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def text(draw: random.Random) -> str:
    """Words of every script with odd characters among them."""
    parts = draw.choices([*SCRIPTS.values(), *ODD, "a cat", "sks dog, red", ""], k=draw.randint(0, 6))
    return draw.choice([" ", ", ", "|||", ""]).join(parts)


def test_two_hundred_pictures(config: Callable[..., Any], tmp_path: Path) -> None:
    draw, folder = random.Random(1), tmp_path / "pictures"
    folder.mkdir()
    for number in range(200):
        whole = picture(draw)
        (folder / f"{number}.png").write_bytes(damaged(draw, whole) if number % 10 else whole)
    made = config(data=[{"path": str(folder), "caption": "a cat", "max_upscale": 100}])
    notes = Notes()
    found = load(made, open_memo(tmp_path / "cache"), notes)
    assert len(found) + sum(notes.unusable.values()) == 200
    assert sum(len(problem.where) for problem in notes.problems) == sum(notes.unusable.values())
    seen = survey.survey(found, lambda *_: None)
    assert seen.looked_at == len({p.content for p in found})
    decoded = broken = 0
    for item in found:
        try:
            image = images.decode(item.record.read(), item.name)
        except UserError:
            broken += 1
        else:
            decoded += 1
            assert (image.height, image.width) == item.geometries[0].original
    assert decoded + broken == len(found)
    assert min(decoded, broken, sum(notes.unusable.values())) > 10


def metadata(draw: random.Random, names: list[str]) -> str:
    """Lines of which some are not what they should be."""
    lines = []
    for name in names:
        named = draw.choice([name] * 6 + ["", "../up.png", "absent.png", name.upper(), 5, None, "a\0b", name + "/"])
        said = draw.choice([text(draw)] * 5 + [None, 3, [], ["a", "b"], [text(draw), 1], {"a": 1}, True])
        row: dict[str, Any] = {"file_name": named, "text": said}
        for key in list(row):
            if draw.random() < 0.03:
                del row[key]
        lines += [json.dumps(row, ensure_ascii=draw.random() < 0.5)] * (1 + (draw.random() < 0.05))
    return "\n".join(lines) + draw.choice(["\n", "", "\n\n", "\n{", "\r\n"] if draw.random() < 0.2 else ["\n"])


def test_a_hundred_metadata_files(tmp_path: Path) -> None:
    content = encoded(Image.new("RGB", (9, 9)), "PNG")
    read = refused = 0
    for seed in range(100):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        names = [f"{i}.png" for i in range(draw.randint(1, 7))]
        for name in names:
            (folder / name).write_bytes(content)
        (folder / "metadata.jsonl").write_bytes(metadata(draw, names).encode("utf-8", "surrogatepass"))
        data, notes = Data(path=str(folder), caption=draw.choice([None, "for all"])), Notes()
        try:
            found = sources.records(data, seed=0, where="data.0.path", notes=notes)
        except UserError:
            refused += 1
            continue
        read += 1
        assert len(found) + sum(notes.unusable.values()) == len(names)
        assert all(caption for record in found for caption in record.captions)
        whole = not notes.problems
        try:
            assert len(sources.records(data, seed=0, where="data.0.path")) == len(names)
        except UserError:
            assert not whole
        else:
            assert whole
    assert min(read, refused) > 5


def test_a_hundred_captions_in_every_script(config: Callable[..., Any], tmp_path: Path) -> None:
    from sdxl_trainer import base as bases
    from sdxl_trainer import text as texts
    from sdxl_trainer.config import TextOptions

    tokenizers = texts.tokenizers(bases.resolve(config().model, tmp_path))
    for seed in range(100):
        draw = random.Random(seed)
        said = text(draw).encode("utf-8", "ignore").decode() or "a cat"
        options = {"shuffle_tags": draw.random() < 0.5, "tag_dropout": draw.choice([0.0, 0.5]), "trigger": "sks"}
        data = Data(path="x", emphasis=draw.random() < 0.5, **options)
        reading = TextOptions(emphasis=draw.choice(["a1111", "comfyui"]), max_chunks=draw.randint(1, 3))
        made = captions.Choices([data], [(0, Record("a.png", (said,), bytes, ""))])[0]
        read = texts.tokenize(tokenizers, made.prompts(), reading)
        cut = texts.cuts(tokenizers, made.prompts(), read)
        lost = {item.prompt: item.tokens for item in cut}
        for prompt, tokens in zip(made.prompts(), read, strict=True):
            assert tokens.ids.shape[1:] == (2, 77)
            assert (tokens.count > 75 * reading.max_chunks) <= (prompt in lost)
        caption = findings.Caption(said, "a.png", data, reading.emphasis)
        assert all(look(caption) is None or isinstance(look(caption), str) for *_, look in findings.CHECKS)


def test_a_hundred_tars_cut_short_or_damaged(tmp_path: Path) -> None:
    """A shard is read whole, or refused, or its samples are named; none is missing without a word."""
    content = encoded(Image.new("RGB", (9, 9)), "PNG")
    read = refused = 0
    for seed in range(100):
        draw = random.Random(seed)
        file, count = io.BytesIO(), draw.randint(1, 6)
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(count):
                for suffix, data in (("png", content), ("txt", text(draw).encode("utf-8", "replace") or b"x")):
                    member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        whole = file.getvalue()
        end = whole.rstrip(b"\0")
        cut = draw.choice([draw.randrange(len(end)), 512 * draw.randrange(1 + len(end) // 512)])
        path = tmp_path / f"{seed}.tar"
        path.write_bytes(whole[:cut] if seed % 4 else whole)
        (tmp_path / str(seed)).mkdir()
        path.rename(tmp_path / str(seed) / "0.tar")
        notes = Notes()
        try:
            found = sources.records(
                Data(path=str(tmp_path / str(seed))), seed=0, where="data.0.path", index_dir=tmp_path / "i", notes=notes
            )
        except UserError:
            refused += 1
            assert seed % 4
            continue
        read += 1
        skipped = sum(sum(kinds.values()) for kinds in notes.skipped.values())
        assert len(found) + sum(notes.unusable.values()) + skipped == count
    assert read >= 25
    assert refused > 50


@pytest.mark.parametrize("size", [0, 511, 512, 1024])
def test_a_shard_that_ends_between_two_files_is_refused(tmp_path: Path, size: int) -> None:
    content = encoded(Image.new("RGB", (9, 9)), "PNG")
    path = tmp_path / "set" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.png", content), ("0.txt", b"a cat"), ("1.png", content), ("1.txt", b"a dog")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    whole = path.read_bytes()
    after_two = 512 + -(-len(content) // 512) * 512 + 1024
    path.write_bytes(whole[: after_two + size] if size < 1024 else whole[:after_two] + b"x" * 512 + whole[after_two:])
    with pytest.raises(UserError, match=r"cut short|cannot be read"):
        sources.records(Data(path=str(path.parent)), seed=0, where="data.0.path")
