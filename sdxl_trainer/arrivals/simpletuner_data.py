"""The data backends of SimpleTuner: what it trains on."""

import math
from pathlib import Path
from typing import Any

from sdxl_trainer.arrivals import reading
from sdxl_trainer.arrivals.account import Account, plain
from sdxl_trainer.errors import UserError

_BOOKKEEPING: tuple[str, ...] = ("id", "type", "dataset_type", "metadata_backend", "cache_dir_vae", "cache_dir")
_BOOKKEEPING += (
    "skip_file_discovery",
    "preserve_data_backend_cache",
    "hash_filenames",
    "text_embeds",
    "write_batch_size",
)
_BOOKKEEPING += ("vae_cache_clear_each_epoch", "vae_batch_size", "disabled", "default", "crop_aspect_buckets")
_BY_SIZE = "pictures are not left out by their size; sdxl check tells of them"
_DROPPED = {
    "minimum_image_size": _BY_SIZE,
    "minimum_aspect_ratio": _BY_SIZE,
    "maximum_aspect_ratio": _BY_SIZE,
    "instance_prompt": "captions come from elsewhere",
    "start_epoch": "from the first step on",
    "delete_problematic_images": "nothing is deleted",
    "delete_unwanted_images": "nothing is deleted",
    "caption_filter_list": "captions are not edited",
}


def backends(made: Account, path: Path, data: Path | None) -> None:
    named = made.options.pop("data_backend_config", None)
    if data is None and named:
        places = (Path(str(named)), path.parent / str(named), path.parent / Path(str(named)).name)
        data = next((place for place in places if place.is_file()), None)
    if data is None:
        what = f"the pictures are named in '{named}', and there is no such file" if named else "no data_backend_config"
        raise UserError(what, str(path), "give it by --data FILE")
    dropout = made.number("caption_dropout_probability", 0.1)
    if not made.has("caption_dropout_probability"):
        made.assumed("data.0.caption_dropout", dropout, "the default there")
    made.part("caption_dropout_probability", "data.caption_dropout")
    defaults: dict[str, Any] = {
        name: made.options.pop(name)
        for name in ("resolution", "resolution_type", "caption_strategy")
        if name in made.options
    }
    index = 0
    for number, entry in enumerate(reading.tree(data).get("", [])):
        backend = made.inner({**defaults, **entry}, f"backends.{number}")
        used = backend.text("dataset_type", "image") == "image" and not backend.look("disabled")
        if used:
            _backend(backend, index, float(dropout))
            index += 1
        else:
            backend.off += [backend.place + name for name in backend.options]
            backend.options.clear()
        backend.finish()
    if not index:
        raise UserError("the data backends hold no pictures", str(data), "add an entry with dataset_type image")


def _backend(backend: Account, index: int, dropout: float) -> None:
    to = f"data.{index}."
    kind = backend.text("type", "local")
    place = {"huggingface": "dataset_name", "aws": "aws_data_prefix"}.get(kind, "instance_data_dir")
    if not backend.has(place):
        fix = "name the pictures in it"
        raise UserError(f"{backend.place}{place} is missing", backend.where, fix)
    where = backend.text(place)
    if kind == "aws":
        where = f"s3://{backend.text('aws_bucket_name', 'bucket')}/{where}"
        backend.changed(place, f"{to}path", where, "pictures are read from folders, and from shards in a bucket")
    else:
        backend.kept(place, f"{to}path", where)
    backend.part("aws_bucket_name", "data.path")
    _sizes(backend, to)
    if backend.has("repeats"):
        count = backend.number("repeats")
        backend.changed("repeats", f"{to}repeats", float(count) + 1.0, "repeats there are beside the first time")
    backend.drop_all({"repeats": "once, as here"})
    _captions(backend, to, kind)
    if dropout:
        backend.put(f"{to}caption_dropout", dropout)
    for name in ("is_regularisation_data", "is_regularization_data"):
        if backend.look(name):
            backend.kept(name, f"{to}prior_prediction", True)
    if backend.has("probability"):
        backend.kept("probability", f"{to}sampling_weight", float(backend.number("probability")))
    if backend.has("max_num_samples"):
        backend.kept("max_num_samples", f"{to}max_samples", int(backend.number("max_num_samples")))
    own = backend.inner(backend.options.pop("huggingface", None) or {}, "huggingface")
    own.keep_all({"caption_column": f"{to}caption_column", "image_column": f"{to}image_column"})
    own.finish()
    if backend.has("split"):
        backend.kept("split", f"{to}split", backend.text("split"))
    backend.unused(*_BOOKKEEPING)
    backend.drop_all(_DROPPED)


def _captions(backend: Account, to: str, kind: str) -> None:
    strategy = backend.text("caption_strategy", "textfile")
    if strategy == "instanceprompt":
        backend.kept("instance_prompt", f"{to}caption", backend.text("instance_prompt"))
        backend.put(f"{to}caption_only", True)
        backend.part("caption_strategy", "data.caption for all pictures")
    elif strategy == "textfile":
        backend.part("caption_strategy", ".txt beside the pictures, each line a caption")
        if not backend.look("disable_multiline_split"):
            backend.put(f"{to}caption_per_line", True)
    elif strategy == "huggingface" or kind == "huggingface":
        backend.part("caption_strategy", "data.caption_column")
    else:
        backend.dropped("caption_strategy", "captions are read from .txt files, metadata.jsonl or a dataset's column")
    if backend.look("prepend_instance_prompt") and backend.has("instance_prompt"):
        backend.kept("instance_prompt", f"{to}caption_prefix", f"{backend.text('instance_prompt')} ")
        backend.part("prepend_instance_prompt", "data.caption_prefix")
    shuffle = backend.options.pop("caption_shuffle", None)
    if isinstance(shuffle, dict) and shuffle.get("enable"):
        backend.put(f"{to}shuffle_tags", True)
        backend.put(f"{to}keep_tags", int(shuffle.get("position_start", 0)))
        backend.put(f"{to}caption_variants", max(1, int(shuffle.get("count", 1))))
        backend.options["caption_shuffle"] = shuffle
        backend.part("caption_shuffle", "data.shuffle_tags, keep_tags and caption_variants")


def _sizes(backend: Account, to: str) -> None:
    given, kind = float(backend.number("resolution", 1024)), backend.text("resolution_type", "pixel_area")
    side = round((math.sqrt(given * 1e6) if kind == "area" else given) / 8) * 8
    if kind == "area" and abs(given - 1.0) < 0.06:
        side = 1024
    if kind == "pixel_area" and side == plain(backend.options.get("resolution")):
        backend.kept("resolution", f"{to}resolution", side)
    else:
        backend.changed("resolution", f"{to}resolution", side, f"the side of a square of that area ({kind})")
    backend.part("resolution_type", "data.resolution")
    square = backend.look("crop") and backend.text("crop_aspect", "square") == "square"
    if square:
        backend.part("crop_aspect", "squares")
        style = backend.text("crop_style", "random")
        if style == "random":
            backend.kept("crop_style", f"{to}crop", "random")
        elif style in {"center", "centre"}:
            backend.part("crop_style", "data.crop = center")
        else:
            backend.changed("crop_style", f"{to}crop", "center", "crops are central, random or around a point")
    else:
        backend.put(f"{to}buckets", "area")
        backend.part("crop_aspect", "data.buckets = area")
    backend.drop_all({"crop_style": "buckets lose little of a picture", "crop_aspect": "data.buckets = area"})
    backend.part("crop", "data.crop and data.buckets")
    if backend.has("max_upscale_threshold"):
        limit = 1.0 + float(backend.number("max_upscale_threshold"))
        backend.changed("max_upscale_threshold", f"{to}max_upscale", limit, "the factor; what needs more is refused")
    names = ("maximum_image_size", "target_downsample_size")
    backend.drop_all(dict.fromkeys(names, "pictures are resized until they just cover their crop"))
