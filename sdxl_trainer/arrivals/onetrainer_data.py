"""The concepts of OneTrainer: what it trains on."""

from pathlib import Path
from typing import Any

from sdxl_trainer.arrivals import common, reading
from sdxl_trainer.arrivals.account import Account
from sdxl_trainer.errors import UserError


def concepts(made: Account, path: Path, data: Path | None) -> None:
    """The pictures: in the config itself, or in a file of their own."""
    concepts = made.options.pop("concepts", None)
    if not concepts:
        name = made.text("concept_file_name", "training_concepts/concepts.json")
        found = data or next(
            (p for p in (Path(name), path.parent / name, path.parent / Path(name).name) if p.is_file()), None
        )
        if found is None:
            what = f"the pictures are named in '{name}', and there is no such file"
            raise UserError(what, str(path), "give it by --data FILE")
        concepts = reading.tree(found).get("", [])
    sides = [int(side) for side in str(made.text("resolution", "512")).replace("x", ",").split(",") if side.strip()]
    bucketed = made.look("aspect_ratio_bucketing", True)
    masked = made.look("masked_training")
    index = 0
    for number, concept in enumerate(concepts):
        if isinstance(concept, dict):
            inner = made.inner(concept, f"concepts.{number}")
            index += _concept(inner, index, sides, bool(bucketed), made)
            inner.finish()
    if not index:
        raise UserError(
            "the config names no pictures that are enabled", str(path), "enable a concept, or give --data FILE"
        )
    made.part("resolution", "data.resolution and more_resolutions")
    made.part("aspect_ratio_bucketing", "data.buckets")
    if masked:
        made.part("masked_training", "data.mask = file: a-masklabel.png beside a.jpg")
        made.part("unmasked_weight", "data.unmasked_weight")
    made.drop_all({"unmasked_weight": "", "masked_training": "", "normalize_masked_area_loss": "no masks"})
    common.left_out_captions(made)


def _concept(concept: Account, index: int, sides: list[int], bucketed: bool, made: Account) -> int:
    """One concept as [[data]] number `index`; how many data sets it became."""
    text = concept.inner(_table(concept, "text"), "text")
    image = concept.inner(_table(concept, "image"), "image")
    concept.unused("name", "seed", "concept_stats")
    if not concept.look("enabled", True):
        for part in (text, image, concept):
            part.off += [part.place + name for name in part.options]
            part.options.clear()
        return 0
    concept.part("enabled", "it is a data set")
    to = f"data.{index}."
    concept.kept("path", f"{to}path", concept.text("path"))
    _sizes(concept, image, to, sides, bucketed)
    _share(concept, to)
    concept.do_anyway({"include_subdirectories": "pictures in sub-folders are always found"})
    concept.drop_all(
        {"image_variations": "crops and flips are drawn in the step", "text_variations": "drawn in the step"}
    )
    if made.look("masked_training"):
        concept.put(f"{to}mask", "file")
        concept.put(f"{to}unmasked_weight", float(made.number("unmasked_weight", 0.1)))
        concept.put(f"{to}mask_normalised", bool(made.look("normalize_masked_area_loss", False)))
    _image(image, to)
    _text(text, to, concept)
    image.finish()
    text.finish()
    return 1


def _sizes(concept: Account, image: Account, to: str, sides: list[int], bucketed: bool) -> None:
    if image.look("enable_resolution_override"):
        sides = [int(side) for side in image.text("resolution_override", "512").replace("x", ",").split(",")]
        image.part("resolution_override", "data.resolution")
        image.part("enable_resolution_override", "data.resolution")
    largest = max(side // 8 * 8 for side in sides)
    concept.put(f"{to}resolution", largest)
    rest = sorted({side // 8 * 8 for side in sides} - {largest})
    if rest:
        concept.assumed(
            f"{to}more_resolutions", rest, "each picture is trained at all of them, not at one that is drawn"
        )
    if bucketed:
        concept.assumed(f"{to}buckets", "area", "aspect_ratio_bucketing, with more shapes than there")


def _share(concept: Account, to: str) -> None:
    """What kind of pictures they are, and how often they are seen."""
    kind = concept.text("type", "STANDARD")
    if kind == "PRIOR_PREDICTION":
        concept.kept("type", f"{to}prior_prediction", True)
    elif kind == "VALIDATION":
        concept.dropped("type", f"trained on, until you set {to}held_out = 1 and validation.loss_every")
    concept.part("type", "pictures")
    if concept.text("balancing_strategy", "REPEATS") == "REPEATS":
        if concept.has("balancing"):
            concept.kept("balancing", f"{to}repeats", float(concept.number("balancing")))
    elif concept.has("balancing"):
        count = int(concept.number("balancing"))
        concept.changed("balancing", f"{to}max_samples", count, "the same pictures in every epoch")
    concept.part("balancing_strategy", "repeats, or a number of pictures")
    if concept.has("loss_weight"):
        concept.kept("loss_weight", f"{to}weight", float(concept.number("loss_weight")))


def _table(concept: Account, name: str) -> dict[str, Any]:
    found = concept.options.pop(name, None)
    return found if isinstance(found, dict) else {}


def _image(image: Account, to: str) -> None:
    if image.look("enable_random_flip"):
        image.kept("enable_random_flip", f"{to}flip", True)
    if image.look("enable_crop_jitter", True):
        why = "crops are drawn anywhere, not near the middle"
        if image.has("enable_crop_jitter"):
            image.changed("enable_crop_jitter", f"{to}crop", "random", why)
        else:
            image.assumed(f"{to}crop", "random", f"crop jitter is on there unless told otherwise; {why}")
    for name in [name for name in image.options if name.startswith("enable_")]:
        if image.look(name):
            image.dropped(name, "pictures are only cropped and flipped")
    image.unused(*[name for name in image.options if name.startswith(("random_", "resolution_override"))])


def _text(text: Account, to: str, concept: Account) -> None:
    source = text.text("prompt_source", "sample")
    if source == "concept":
        caption = _first_line(Path(text.text("prompt_path", ""))) or Path(concept.text("path", "")).name
        text.changed("prompt_source", f"{to}caption", caption, "one caption for all: look at it")
    elif source == "filename":
        text.dropped("prompt_source", "captions are not read from file names: write .txt files, or metadata.jsonl")
    text.part("prompt_source", ".txt beside the pictures, or metadata.jsonl")
    text.part("prompt_path", "see prompt_source")
    _tags(text, to)
    text.drop_all({"tag_dropout_special_tags": "all tags are left out alike"})
    text.unused("tag_dropout_special_tags_mode", "tag_dropout_special_tags_regex")
    if text.look("caps_randomize_enable"):
        text.dropped("caps_randomize_enable", "letters stay as they are")
    text.unused(*[name for name in text.options if name.startswith("caps_randomize")])


def _tags(text: Account, to: str) -> None:
    share = float(text.number("tag_dropout_probability", 0.0))
    if text.look("tag_dropout_enable") and text.text("tag_dropout_mode", "FULL") != "FULL":
        text.kept("tag_dropout_probability", f"{to}tag_dropout", share)
        text.part("tag_dropout_mode", "each tag by chance, all equally")
    elif text.look("tag_dropout_enable"):
        text.changed("tag_dropout_probability", f"{to}caption_dropout", share, "mode FULL: all tags or none")
    if text.look("enable_tag_shuffling"):
        text.kept("enable_tag_shuffling", f"{to}shuffle_tags", True)
    made = text.tree["data"][int(to.split(".")[1])]
    if made.get("shuffle_tags") or made.get("tag_dropout"):
        text.put(f"{to}keep_tags", int(text.number("keep_tags_count", 1)))
        text.part("keep_tags_count", "data.keep_tags")
        if text.text("tag_delimiter", ",").strip() not in {"", ","}:
            text.kept("tag_delimiter", f"{to}tag_separator", text.text("tag_delimiter").strip())
    text.part("tag_dropout_enable", "data.tag_dropout or caption_dropout")
    text.unused("keep_tags_count", "tag_delimiter", "tag_dropout_mode", "tag_dropout_probability")


def _first_line(path: Path) -> str:
    return (reading.text(path).splitlines() or [""])[0].strip() if path.is_file() else ""
