"""Bad inputs: buckets, crops, masks, sampling and held-out pictures."""

from typing import Any

from tests.bad_inputs.data_rows import encoded, fresh_folder
from tests.bad_inputs.place import Bad, Place

CAPTION = {"data.0.caption": "a red circle"}


def data(**options: Any) -> dict[str, Any]:
    return {f"data.0.{name}": value for name, value in options.items()}


def second(place: Place, **options: Any) -> None:
    """A second data set of the same folder."""
    place.tree["data"].append({"path": "pictures", "resolution": 64, **options})


def focused(place: Place, value: object) -> None:
    place.picture("more.png", encoded(70, 70))
    rows = [{"file_name": f"{index}.png", "text": "a", "focus": value} for index in range(6)]
    place.remove("pictures/metadata.jsonl")
    place.put("pictures/metadata.jsonl", "")
    place.rows(*rows, {"file_name": "more.png", "text": "a", "focus": [0.5, 0.5]})


ROWS = [
    Bad(
        "address of no kind",
        "cannot be opened: Protocol not known: nosuch",
        "spelling",
        options=data(path="nosuch://x"),
    ),
    Bad("address without shards", "no .tar shards", "pack the pictures", options=data(path="memory://nothing")),
    Bad("bucket sizes empty", "buckets = 'sizes' without bucket_sizes", "list them", options=data(buckets="sizes")),
    Bad("unknown buckets", 'data.0.buckets = "aera"', "area", options=data(buckets="aera")),
    Bad(
        "bucket not of eights",
        "data.0.bucket_sizes.0.1 = 1001",
        "1000 or 1008",
        options=data(buckets="sizes", bucket_sizes=[[1024, 1001]]),
    ),
    Bad(
        "bucket of one side",
        "'data.0.bucket_sizes.0' has too few values",
        "every value",
        options=data(buckets="sizes", bucket_sizes=[[1024]]),
    ),
    Bad("bucket of no size", "data.0.bucket_sizes.0.0 = 0", "8", options=data(buckets="sizes", bucket_sizes=[[0, 8]])),
    Bad(
        "bucket step not of eights", "data.0.bucket_step = 12", "8 or 16", options=data(buckets="area", bucket_step=12)
    ),
    Bad(
        "bucket step above the resolution",
        "there is no bucket for resolution 64 in steps of 128",
        "smaller bucket_step",
        options=data(buckets="area", bucket_step=128),
    ),
    Bad(
        "bucket limits cross",
        "there is no bucket for resolution 64",
        "bucket_min <= resolution <= bucket_max",
        options=data(buckets="area", bucket_step=8, bucket_min=96, bucket_max=80),
    ),
    Bad(
        "paper's buckets at a resolution that does not scale",
        "do not scale to resolution 64",
        "multiple of 128",
        options=data(buckets="sdxl"),
    ),
    Bad("bucket step without buckets", "bucket_step has no effect", 'buckets = "area"', options=data(bucket_step=8)),
    Bad(
        "bucket sizes with area",
        "bucket_sizes has no effect",
        'buckets = "sizes"',
        options=data(buckets="area", bucket_sizes=[[64, 64]], bucket_step=8),
    ),
    Bad(
        "resolution with bucket sizes",
        "resolution has no effect",
        "remove it",
        options=data(buckets="sizes", bucket_sizes=[[64, 64]]),
    ),
    Bad("no_upscale without buckets", "no_upscale has no effect", "buckets", options=data(no_upscale=True)),
    Bad(
        "picture too small for any bucket",
        "70 x 70 pixels has no bucket with sides of 72",
        "smaller bucket_min",
        "small.png",
        make=lambda p: fresh_folder(p, {"small.png": encoded(70, 70)}),
        options=data(buckets="area", resolution=96, bucket_step=8, bucket_min=72, no_upscale=True) | CAPTION,
    ),
    Bad("resolution named twice", "names one resolution twice", "once", options=data(more_resolutions=[48, 64])),
    Bad(
        "further resolution not of eights",
        "data.0.more_resolutions.0 = 50",
        "48 or 56",
        options=data(more_resolutions=[50]),
    ),
    Bad(
        "focus outside of the picture",
        r"6 points of focus are not two shares from 0 to 1: \[1.5, 0.5\] \(metadata.jsonl:1\)",
        "shares of width and height",
        make=lambda p: focused(p, [1.5, 0.5]),
        options=data(focus="column"),
    ),
    Bad(
        "focus that is no point",
        "not two shares",
        "x and y",
        make=lambda p: focused(p, "left"),
        options=data(focus="column"),
    ),
    Bad(
        "focus column missing",
        "no column 'focus'; columns: file_name, text",
        "focus_column",
        options=data(focus="column"),
    ),
    Bad("focus on no mask", "focus = 'mask' without a mask", "mask = ", options=data(focus="mask")),
    Bad("focus column without focus", "focus_column has no effect", 'focus = "column"', options=data(focus_column="x")),
    Bad("masks missing", "6 pictures have no mask: 0.png", "draw one for each", options=data(mask="file")),
    Bad(
        "mask of another shape",
        "the mask has 70 x 30 pixels, its picture 70 x 70",
        "from the picture as it is",
        "a-masklabel.png",
        make=lambda p: fresh_folder(p, {"a.png": encoded(70, 70), "a-masklabel.png": encoded(70, 30)}),
        options=data(mask="file") | CAPTION,
    ),
    Bad(
        "mask that is no picture",
        "not a picture",
        "replace",
        "a-masklabel.png",
        make=lambda p: fresh_folder(p, {"a.png": encoded(70, 70), "a-masklabel.png": b"words"}),
        options=data(mask="file") | CAPTION,
    ),
    Bad("mask options without a mask", "unmasked_weight has no effect", "mask = ", options=data(unmasked_weight=0.5)),
    Bad(
        "mask without effect",
        "unmasked_weight = 1: the mask has no effect",
        "less",
        options=data(mask="alpha", unmasked_weight=1),
    ),
    Bad("repeats of zero", "data.0.repeats = 0", "greater than 0", options=data(repeats=0)),
    Bad("sampling weight alone", "sampling_weight has no effect", "repeats", options=data(sampling_weight=2.0)),
    Bad(
        "sampling weight for one of two",
        "data.0 has a sampling_weight, data.1 has none",
        "to each",
        options=data(sampling_weight=2.0),
        make=second,
    ),
    Bad(
        "repeats and sampling weight",
        "both say how often",
        "one of them",
        options=data(sampling_weight=2.0, repeats=2),
        make=lambda p: second(p, sampling_weight=1.0),
    ),
    Bad("only regularisation", "nothing to learn", "regularisation = false", options=data(regularisation=True)),
    Bad(
        "repeats of regularisation",
        "data.1.repeats has no effect",
        "remove repeats",
        make=lambda p: second(p, regularisation=True, repeats=3),
    ),
    Bad("everything held out", "held_out = 1 leaves nothing", "0.05", options=data(held_out=1)),
    Bad(
        "held out and not measured",
        "data.1.held_out = 1 has no effect",
        "loss_every",
        make=lambda p: second(p, held_out=1),
    ),
    Bad(
        "repeats of what is held out",
        "data.1.repeats has no effect",
        "held_out below 1",
        make=lambda p: second(p, held_out=1, repeats=2),
    ),
    Bad(
        "held out and trained",
        "6 pictures are held out and trained too: 0.png",
        "remove them",
        options={"validation.loss_every": 1},
        make=lambda p: second(p, held_out=1),
    ),
    Bad(
        "pictures outside of kohya's folders",
        "6 pictures lie outside of folders named like 10_words",
        "kohya_folders",
        options=data(kohya_folders=True),
    ),
]
