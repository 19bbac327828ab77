"""A data set: where its pictures are, their crops and captions."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_trainer.config.section import Amount, Fraction, PathText, Positive, Section, Side, Text, option


class Data(Section):
    path: PathText = Field(description="folder of pictures, hub dataset, local dataset folder, or address of shards")
    name: Text = option(None, "configuration of a hub dataset")
    folder: Text = option(None, "sub-folder of a hub dataset (its data_dir)")
    split: str = option("train", "split of a dataset")
    disk: Amount | None = option(
        None,
        "what copies of a hub dataset's or an address's parquet files may take, such as 50GB; default: all are kept",
    )
    image_column: str = option("image", "column holding the picture")
    caption_column: str = option("text", "column holding a caption or a list of captions")
    metadata: PathText | None = option(
        None,
        "captions of a folder of pictures: a .jsonl, .csv or .parquet file, or .json as kohya writes it, in the"
        " folder or elsewhere; default: metadata.jsonl, .csv or .parquet in it",
    )
    caption_extension: str | None = option(
        None, "ending of the caption files, in the place of .txt and .caption", pattern=r"^\.?[^\s./\\][^\s/\\]*$"
    )
    caption: Text = option(None, "one caption for all pictures that have none")
    caption_only: bool = option(False, "caption for all pictures, whatever captions they have")
    max_samples: Positive | None = option(None, "use only this many pictures, drawn with the run's seed")
    resolution: Side = option(1024, "side of the square crop in pixels; with buckets the root of the area")
    more_resolutions: tuple[Side, ...] = option((), "every picture is trained at each of these too")
    buckets: Literal["none", "area", "sdxl", "sizes"] = option(
        "none", "shapes of the crops: squares, all shapes of one area, the SDXL paper's list, or bucket_sizes"
    )
    bucket_step: Side = option(64, "sides of area buckets are multiples of this")
    bucket_min: Side | None = option(None, "shortest side of area buckets; default: a quarter of the resolution")
    bucket_max: Side | None = option(None, "longest side of area buckets; default: twice the resolution")
    bucket_sizes: tuple[tuple[Side, Side], ...] = option((), "[width, height] of each bucket, for buckets = 'sizes'")
    no_upscale: bool = option(False, "no picture is enlarged: small ones get a bucket of their own size")
    interpolation: Literal["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"] = option(
        "lanczos", "resampling filter"
    )
    crop: Literal["center", "random"] = option("center", "where the crop is taken")
    crops_per_image: Positive | None = option(None, "random crops kept in the cache per picture; default 4")
    flip: bool = option(False, "mirror half of the time")
    focus: Literal["none", "column", "mask"] = option(
        "none", "a point that crops keep: the one named in focus_column, or the centre of the mask"
    )
    focus_column: str = option("focus", "column of the point: x and y as shares of the picture, from the top left")
    mask: Literal["none", "file", "alpha", "column"] = option(
        "none", "what of a picture is trained: white in a file beside it or named in mask_column, or what is opaque"
    )
    mask_suffix: str = option("-masklabel", "the mask of a.jpg is a-masklabel.png", min_length=1)
    mask_column: str = option("mask", "column holding or naming the mask")
    mask_normalised: bool = option(True, "divide by the mask's mean: small masks weigh as much as large ones")
    unmasked_weight: Fraction = option(0.0, "weight of what the mask leaves out")
    max_upscale: float = option(8.0, "pictures that would be enlarged by more are refused", gt=0)
    caption_dropout: Fraction = option(0.0, "how often the caption is left out; drawn anew every time")
    caption_column_2: Text = option(None, "column with captions for the second text encoder; default: the same ones")
    caption_per_line: bool = option(False, "each line of a caption file is a caption of its own")
    caption_weights: tuple[Annotated[float, Field(ge=0)], ...] = option(
        (), "how often the first, second, ... of a picture's captions is drawn; default: all equally"
    )
    caption_prefix: str = option("", "text before each caption")
    caption_suffix: str = option("", "text after each caption")
    trigger: Text = option(None, "word put in the place of [trigger], or first where a caption does not hold it")
    tag_separator: str = option(",", "what separates the tags of a caption", min_length=1)
    shuffle_tags: bool = option(False, "tags in an order that is drawn")
    tag_dropout: Fraction = option(0.0, "how often each tag is left out")
    keep_tags: int = option(0, "first tags that are neither shuffled nor left out", ge=0)
    keep_separator: Text = option(
        None, "mark such as ||| after the tags that are kept, and before those kept at the end"
    )
    wildcards: bool = option(False, "read {a|b|c} as one of these, and __name__ as a line of the file name.txt")
    wildcards_dir: PathText | None = option(None, "folder of the wildcard files")
    caption_variants: Positive | None = option(
        None, "variants made of each caption by shuffling, leaving out and wildcards; default 8"
    )
    emphasis: bool = option(False, "read weights such as (word:1.2) in these captions, as text.emphasis says")
    aesthetic_score: float = option(6.0, "what a refiner is told of how beautiful these pictures are", ge=0, le=10)
    weight: float = option(1.0, "factor on the loss of these pictures", gt=0)
    repeats: float = option(1.0, "how often each picture is seen per epoch; 0.5: half of them, in turn", gt=0)
    sampling_weight: float | None = option(
        None, "share of the samples relative to other data sets, in place of repeats", gt=0
    )
    regularisation: bool = option(False, "as many samples an epoch as all other data sets together, in turn")
    prior_prediction: bool = option(
        False, "learn to keep what the base predicts for these pictures and captions, in place of the pictures"
    )
    generate: int = option(0, "class pictures: the base draws until the folder holds this many; 0: none", ge=0)
    generate_prompts: tuple[str, ...] = option(
        (), "prompts drawn in turn, each written beside its picture as caption; default: caption"
    )
    generate_steps: Positive = option(50, "denoising steps of drawn pictures")
    generate_guidance: float = option(5.0, "classifier-free guidance scale of drawn pictures", ge=0)
    generate_batch: Positive = option(4, "drawn pictures per forward pass")
    generate_precision: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto", "type in which the UNet draws; auto: train.precision"
    )
    kohya_folders: bool = option(False, "folders named 10_words: 10 repeats, and words where there is no caption")
    held_out: Fraction = option(
        0.0,
        "share of the pictures kept out of training, chosen by their bytes alone; 1: this data set is for validation",
    )
