"""What is encoded when: nothing twice, everything that changed, and nothing that did not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import base as bases
from sdxl_trainer.data import prepare
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.errors import UserError


@pytest.fixture
def stock(config: Callable[..., Any], pictures: Path, tmp_path: Path) -> Callable[..., Stock]:
    """Takes stock of a run on a copy of the pictures with a cache of its own; fills it if asked."""
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)

    def take(fill: bool = False, progress: Any = lambda *_: None, **options: Any) -> Stock:
        data = [{"path": str(copy), **entry} for entry in options.pop("data", [{}])]
        cache = {"path": str(tmp_path / "cache"), **options.pop("cache", {})}
        made = config(**options, data=data, cache=cache)
        found = bases.resolve(made.model, tmp_path)
        taken = prepare.take_stock(made, found, "fp32")
        if fill:
            prepare.fill(made, found, taken, torch.device("cpu"), progress, print)
        return taken

    return take


def missing(stock: Stock) -> tuple[int, int]:
    return len(stock.missing_latents()), len(stock.missing_texts())


def test_a_second_run_encodes_nothing(stock: Callable[..., Stock]) -> None:
    assert missing(stock()) == (6, 7)
    stock(fill=True)
    assert missing(stock()) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"train": {"learning_rate": 1e-5}},
        {"seed": 9},
        {"data": [{"caption_dropout": 0.5}]},
        {"objective": {"snr_gamma": 1.0}},
        {"output_dir": "elsewhere"},
    ],
    ids=str,
)
def test_options_that_do_not_change_a_row_encode_nothing(stock: Callable[..., Stock], options: dict[str, Any]) -> None:
    stock(fill=True)
    assert missing(stock(**options)) == (0, 0)


def test_one_changed_picture_is_one_row(stock: Callable[..., Stock], tmp_path: Path) -> None:
    stock(fill=True)
    shutil.copyfile(tmp_path / "copy" / "1.png", tmp_path / "copy" / "0.png")
    assert missing(stock()) == (0, 0), "the same bytes under another name are the same row"
    from PIL import Image

    Image.new("RGB", (90, 90), "red").save(tmp_path / "copy" / "0.png")
    assert missing(stock()) == (1, 0)


def test_one_changed_caption_is_one_row(stock: Callable[..., Stock], tmp_path: Path) -> None:
    stock(fill=True)
    path = tmp_path / "copy" / "metadata.jsonl"
    path.write_text(path.read_text().replace("a red circle", "a red circle, edited"))
    assert missing(stock()) == (0, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": [{"resolution": 72}]}, (6, 0)),
        ({"data": [{"flip": True}]}, (6, 0)),
        ({"data": [{"interpolation": "bilinear"}]}, (6, 0)),
        ({"validation": {"prompts": ["new words"]}}, (0, 1)),
    ],
    ids=str,
)
def test_options_that_change_rows_encode_those(
    stock: Callable[..., Stock], options: dict[str, Any], expected: tuple[int, int]
) -> None:
    stock(fill=True)
    assert missing(stock(**options)) == expected


def test_another_vae_or_text_encoder_encodes_its_part_anew(
    stock: Callable[..., Stock], base: Path, tmp_path: Path
) -> None:
    from sdxl_trainer.blueprint import build
    from tests.conftest import CAPTIONS

    stock(fill=True)
    other = build(tmp_path / "other", "tiny", captions=CAPTIONS, seed=1)
    assert missing(stock(model={"vae": str(other / "vae")})) == (6, 0)
    mixed = tmp_path / "mixed"
    shutil.copytree(base, mixed)
    shutil.rmtree(mixed / "text_encoder_2")
    shutil.copytree(other / "text_encoder_2", mixed / "text_encoder_2")
    assert missing(stock(model={"path": str(mixed)})) == (0, 7)


def test_moments_are_those_of_the_vae(stock: Callable[..., Stock], base: Path) -> None:
    from diffusers import AutoencoderKL

    from sdxl_trainer.data import images

    made = stock(fill=True, data=[{"crop": "random", "flip": True}])
    vae = AutoencoderKL.from_pretrained(base / "vae")
    for picture in made.pictures:
        for geometry in picture.geometries:
            pixels = images.pixels(images.decode(picture.record.read(), ""), geometry, "lanczos")
            scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            posterior = vae.encode(scaled).latent_dist
            row = made.latents.get(made.keys.latent(picture, geometry))
            assert row.dtype == torch.float16
            torch.testing.assert_close(row[:4].float(), posterior.mean[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(row[4:].float(), posterior.std[0], rtol=1e-3, atol=1e-3)


def test_processes_that_do_not_share_a_folder_are_told(
    stock: Callable[..., Stock], config: Any, tmp_path: Path
) -> None:
    """The first of two, whose other one has put its rows elsewhere."""
    taken = stock()
    made = config(cache={"path": str(tmp_path / "cache")})
    found = bases.resolve(made.model, tmp_path)
    with pytest.raises(UserError, match="what other processes encoded is not in this one's cache folder") as caught:
        prepare.fill(made, found, taken, torch.device("cpu"), lambda *_: None, print, 0, 2)
    assert "that all machines share" in caught.value.fix
    assert len(stock().missing_latents()) == 3, "its own are there"


def test_captions_that_are_cut_off_are_counted_over_all_processes(
    stock: Callable[..., Stock], config: Any, tmp_path: Path
) -> None:
    """The first of two processes, which alone says something, after the second one."""
    options = {"text": {"long_captions": "cut"}, "data": [{"caption_prefix": "word " * 90}]}
    first, second = stock(**options), stock(**options)
    made = config(text=options["text"], cache={"path": str(tmp_path / "cache")})
    base = bases.resolve(made.model, tmp_path)
    theirs: list[Any] = []
    said: list[str] = []

    def fill(taken: Stock, rank: int, gathered: Callable[[list[Any]], list[Any]]) -> None:
        prepare.fill(made, base, taken, torch.device("cpu"), lambda *_: None, said.append, rank, 2, gathered)

    with pytest.raises(UserError, match="what other processes encoded"):
        fill(second, 1, lambda rows: theirs.extend(rows) or rows)
    said.clear()
    fill(first, 0, lambda rows: rows + theirs if rows else rows)
    assert len(said) == 1
    assert said[0].startswith("6 captions have more than 75 tokens, the rest is cut off: 'word word")
    assert said[0].endswith(" and 3 more")


def test_a_row_does_not_depend_on_what_is_encoded_beside_it(stock: Callable[..., Stock], tmp_path: Path) -> None:
    """Batches of a part of a cache are others than those of all of it: an interrupted filling goes on bitwise."""
    options: dict[str, Any] = {"data": [{"resolution": 96}]}
    whole = stock(fill=True, **options)
    rows = [whole.keys.latent(p, g) for p in whole.pictures for g in p.geometries]
    before = [whole.latents.get(name).clone() for name in rows]
    shutil.rmtree(tmp_path / "cache")
    copy, kept = tmp_path / "copy", tmp_path / "kept"
    shutil.copytree(copy, kept)
    for name in ("0.png", "1.png", "2.png", "3.png", "4.png"):
        (copy / name).write_bytes((copy / name).read_bytes()[:900])  # opens, and cannot be decoded
    with pytest.raises(UserError, match="5 pictures"):
        stock(fill=True, **options)
    assert len(stock(**options).missing_latents()) == 5
    shutil.rmtree(copy)
    kept.rename(copy)
    again = stock(fill=True, **options)
    assert all(torch.equal(row, again.latents.get(name)) for name, row in zip(rows, before, strict=True))


def test_pictures_are_decoded_ahead_within_a_bound(
    stock: Callable[..., Stock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody asks for them, as many as fit into the bound: two of the six, or all."""
    import time

    from sdxl_trainer.config import Cache
    from sdxl_trainer.data import encode, images

    decode, seen = images.decode, tmp_path / "seen"

    def counted(content: bytes, name: str) -> Any:
        with seen.open("a") as file:
            file.write(".")
        return decode(content, name)

    monkeypatch.setattr(images, "decode", counted)
    work = stock().missing_latents()
    for room, expected in ((0, 2), (6 * 3 * 64**2, 6)):
        monkeypatch.setattr(encode, "AHEAD_BYTES", room)
        seen.write_text("")
        pictures = encode.decoded(work, Cache(workers=1))
        end = time.monotonic() + 60
        while len(seen.read_text()) < expected and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.2)
        assert len(seen.read_text()) == expected
        items = [item for item in pictures if isinstance(item, encode.Decoded)]
        assert [(item.picture, item.geometry) for item in items] == list(work)
        assert len(seen.read_text()) == 6


def test_all_pictures_that_cannot_be_decoded_are_named_together(stock: Callable[..., Stock], tmp_path: Path) -> None:
    for name in ("0.png", "3.png"):
        path = tmp_path / "copy" / name
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="2 pictures") as caught:
        stock(fill=True)
    assert "0.png" in caught.value.where
    assert "3.png" in caught.value.where
    assert len(stock().missing_latents()) == 2, "the good ones are kept"


@pytest.mark.parametrize("size", [2, 4])
def test_progress_reaches_the_end_once(stock: Callable[..., Stock], size: int) -> None:
    told: list[tuple[int, int, str]] = []
    stock(fill=True, progress=lambda *said: told.append(said), cache={"batch_size": size})
    for what, count in (("captions", 7), ("pictures", 6)):
        steps = [done for done, total, name in told if name == what and total == count]
        assert steps[-1] == count
        assert steps == sorted(set(steps))


def test_latents_are_scaled_as_the_vae_says() -> None:
    from sdxl_trainer.model import latent_scale

    scale = latent_scale({"scaling_factor": 0.5, "latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0, 2, 2, 4]})
    got = scale.sample(
        torch.full((1, 4, 1, 1), 5.0).half(), torch.ones(1, 4, 1, 1).half(), torch.full((1, 4, 1, 1), 2.0)
    )
    assert got.flatten().tolist() == [(7 - m) * 0.5 / s for m, s in zip([1, 2, 3, 4], [2, 2, 2, 4], strict=True)]


BUCKETS = {"buckets": "area", "bucket_step": 8, "bucket_min": 24}


def test_with_buckets_exactly_what_changed_is_encoded(stock: Callable[..., Stock], base: Path, tmp_path: Path) -> None:
    """One picture, one caption, the VAE, the resolution, the buckets: counted; rates, weights and repeats: nothing."""
    from PIL import Image

    from sdxl_trainer.blueprint import build
    from tests.conftest import CAPTIONS

    plain = {"data": [BUCKETS]}
    assert missing(stock(**plain)) == (6, 7)
    first = stock(fill=True, **plain)
    assert len({p.geometries[0].target for p in first.pictures}) == 5
    same = {"repeats": 3, "weight": 0.5, "caption_dropout": 0.1, "held_out": 0.3}
    assert missing(stock(data=[BUCKETS | same], train={"learning_rate": 1e-5, "batch_size": 3})) == (0, 0)
    # Squares are the same rows with and without buckets: two of the six pictures are square.
    assert missing(stock()) == (4, 0)
    assert missing(stock(data=[{**BUCKETS, "resolution": 72}])) == (6, 0)
    assert missing(stock(data=[{**BUCKETS, "more_resolutions": [48]}])) == (6, 0)
    other = build(tmp_path / "other", "tiny", captions=CAPTIONS, seed=1)
    assert missing(stock(model={"vae": str(other / "vae")}, **plain)) == (6, 0)
    Image.new("RGB", (60, 110), "red").save(tmp_path / "copy" / "0.png")
    path = tmp_path / "copy" / "metadata.jsonl"
    path.write_text(path.read_text().replace("a green circle", "a green circle, edited"))
    assert missing(stock(**plain)) == (1, 1)
    stock(fill=True, **plain)
    assert missing(stock(**plain)) == (0, 0)


def test_a_moved_focus_is_one_row(stock: Callable[..., Stock], tmp_path: Path) -> None:
    import json

    path = tmp_path / "copy" / "metadata.jsonl"
    rows = [json.loads(line) | {"focus": [0.0, 0.0]} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    focused = {"data": [{"focus": "column"}]}
    stock(fill=True, **focused)
    rows[0]["focus"] = [1.0, 0.0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert missing(stock(**focused)) == (1, 0)
