"""Options of a data set that contradict each other or would do nothing: refused before anything is read (law 7)."""

from collections.abc import Callable, Sequence

from sdxl_trainer.config import Config, Data
from sdxl_trainer.data import buckets
from sdxl_trainer.data.captions import draws
from sdxl_trainer.errors import UserError

# (option, when it does nothing, what would give it an effect): refused where it differs from its default.
INERT: list[tuple[str, Callable[[Data], bool], str]] = [
    ("crops_per_image", lambda d: d.crop != "random", 'crop = "random"'),
    ("focus_column", lambda d: d.focus != "column", 'focus = "column"'),
    ("mask_suffix", lambda d: d.mask != "file", 'mask = "file"'),
    ("mask_column", lambda d: d.mask != "column", 'mask = "column"'),
    ("mask_normalised", lambda d: d.mask == "none", 'mask = "file"'),
    ("unmasked_weight", lambda d: d.mask == "none", 'mask = "file"'),
    ("bucket_step", lambda d: d.buckets != "area", 'buckets = "area"'),
    ("bucket_min", lambda d: d.buckets != "area", 'buckets = "area"'),
    ("bucket_max", lambda d: d.buckets != "area", 'buckets = "area"'),
    ("bucket_sizes", lambda d: d.buckets != "sizes", 'buckets = "sizes"'),
    ("resolution", lambda d: d.buckets == "sizes", 'buckets = "area"'),
    ("more_resolutions", lambda d: d.buckets == "sizes", 'buckets = "area"'),
    ("caption_only", lambda d: d.caption is None, "caption"),
    ("caption_column_2", lambda d: d.caption_only, "caption_only = false"),
    *(
        (f"generate_{name}", lambda d: not d.generate, "generate")
        for name in ("prompts", "steps", "guidance", "batch", "precision")
    ),
    ("no_upscale", lambda d: d.buckets == "none", 'buckets = "area"'),
    *(
        (name, lambda d: not d.shuffle_tags and not d.tag_dropout, "shuffle_tags or tag_dropout")
        for name in ("keep_tags", "keep_separator")
    ),
    (
        "tag_separator",
        lambda d: not d.shuffle_tags and not d.tag_dropout and d.trigger is None,
        "shuffle_tags, tag_dropout or trigger",
    ),
    ("wildcards_dir", lambda d: not d.wildcards, "wildcards"),
    ("caption_variants", lambda d: not draws(d), "shuffle_tags, tag_dropout or wildcards"),
    # What is said of training, of pictures that are never trained.
    *(
        (name, lambda d: d.held_out == 1, "held_out below 1")
        for name in (
            *("repeats", "sampling_weight", "weight", "regularisation", "prior_prediction"),
            *("flip", "caption_dropout", "shuffle_tags", "tag_dropout"),
        )
    ),
]


def refuse(config: Config, where: str) -> None:
    """UserError for the first contradiction in a data set or among them; `where` is the config's name."""
    for index, data in enumerate(config.data):
        key = f"data.{index}"
        if data.buckets == "sizes" and not data.bucket_sizes:
            what = f"{key}.buckets = 'sizes' without bucket_sizes"
            raise UserError(what, where, "list them: bucket_sizes = [[1024, 1024], [1216, 832]], each width and height")
        for name, inert, needed in INERT:
            if getattr(data, name) != _default(name) and inert(data):
                raise UserError(f"{key}.{name} has no effect without {needed}", where, f"remove it, or set {needed}")
        _refuse_buckets(data, key, where)
        _refuse_masks(data, key, where)
        _refuse_drawing(data, key, where)
        _refuse_captions(data, key, where)
    if all(data.held_out == 1 for data in config.data):
        fix = "give a share such as 0.05, or add the data set to train on"
        raise UserError("data.0.held_out = 1 leaves nothing to train on", where, fix)
    _refuse_sampling(config.data, where)
    _refuse_emphasis(config, where)


def _refuse_captions(data: Data, key: str, where: str) -> None:
    if data.keep_tags and data.keep_separator is not None:
        what = f"{key}.keep_tags and {key}.keep_separator are two ways to say which tags are kept"
        raise UserError(what, where, "give one of them")
    for name in ("keep_separator", "trigger"):
        if getattr(data, name) is not None and not getattr(data, name).strip():
            raise UserError(f"{key}.{name} is empty", where, "remove it, or give its text")
    if data.keep_separator is not None and data.keep_separator in data.tag_separator:
        what = f"{key}.keep_separator = '{data.keep_separator}' also stands in every tag_separator"
        raise UserError(what, where, 'choose a mark that no caption holds otherwise, such as "|||"')
    if data.caption_weights and not any(data.caption_weights):
        raise UserError(f"{key}.caption_weights are all zero", where, "give a positive weight to one of them")


def _refuse_emphasis(config: Config, where: str) -> None:
    """Emphasis is read where text.emphasis says how and something says that it is meant: one alone does nothing."""
    emphasis, marked = config.text.emphasis, [index for index, data in enumerate(config.data) if data.emphasis]
    if marked and emphasis == "off":
        what = f"data.{marked[0]}.emphasis has no effect: text.emphasis is 'off'"
        raise UserError(what, where, 'set text.emphasis = "a1111" or "comfyui", or remove it')
    if emphasis != "off" and not marked and not config.validation.prompts:
        what = f"text.emphasis = '{emphasis}' has no effect: no data set has emphasis = true, no prompt is drawn"
        raise UserError(what, where, "set emphasis = true under [[data]], or remove it")


def _refuse_drawing(data: Data, key: str, where: str) -> None:
    if not data.generate:
        return
    if not any(prompt.strip() for prompt in data.generate_prompts or (data.caption or "",)):
        what = f"{key}.generate = {data.generate} without a prompt for the class pictures"
        raise UserError(what, where, 'give the class as caption = "a photo of a dog", or generate_prompts')
    if data.generate_prompts and data.caption_only:
        what = f"{key}.caption_only = true: the captions of generate_prompts would not be read"
        raise UserError(what, where, "remove caption_only, or generate_prompts: then caption is drawn")
    if "://" in data.path:
        what = f"{key}.generate = {data.generate}: pictures cannot be drawn into '{data.path}'"
        raise UserError(what, where, "give a folder on this machine as path")
    if data.kohya_folders or data.mask == "file":
        option = "kohya_folders" if data.kohya_folders else "mask"
        raise UserError(f"{key}.{option} does not go with pictures that are drawn", where, f"remove {option}")


def _refuse_buckets(data: Data, key: str, where: str) -> None:
    if data.buckets == "sizes":
        return
    if data.resolution in data.more_resolutions or len(set(data.more_resolutions)) < len(data.more_resolutions):
        raise UserError(f"{key}.more_resolutions names one resolution twice", where, "name each once; see resolution")
    for resolution in (data.resolution, *data.more_resolutions):
        if data.buckets == "sdxl" and resolution % 128:
            what = f"{key}: the SDXL paper's buckets do not scale to resolution {resolution} in multiples of 8"
            raise UserError(what, where, 'use a multiple of 128, or buckets = "area" with a bucket_step')
        if not buckets.sizes(data, resolution):
            what = f"{key}: there is no bucket for resolution {resolution} in steps of {data.bucket_step}"
            fix = "use a smaller bucket_step, and bucket_min <= resolution <= bucket_max"
            raise UserError(what, where, fix)


def _refuse_masks(data: Data, key: str, where: str) -> None:
    if data.focus == "mask" and data.mask == "none":
        raise UserError(f"{key}.focus = 'mask' without a mask", where, 'set mask = "file", "alpha" or "column"')
    if data.unmasked_weight == 1:
        what = f"{key}.unmasked_weight = 1: the mask has no effect"
        raise UserError(what, where, 'give less than 1, or set mask = "none"')


def _refuse_sampling(sets: Sequence[Data], where: str) -> None:
    trained = [(index, data) for index, data in enumerate(sets) if not data.regularisation and data.held_out < 1]
    if not trained:
        what = "every data set is one of regularisation: there is nothing to learn"
        raise UserError(what, where, "set regularisation = false for the pictures to be learned")
    if all(data.prior_prediction or data.regularisation or data.held_out == 1 for data in sets):
        what = "every data set keeps what the base predicts: there is nothing to learn"
        raise UserError(what, where, "set prior_prediction = false for the pictures to be learned")
    for index, data in enumerate(sets):
        given = [name for name in ("repeats", "sampling_weight") if getattr(data, name) != _default(name)]
        if data.regularisation and given:
            what = f"data.{index}.{given[0]} has no effect: regularisation says how often pictures are seen"
            raise UserError(what, where, f"remove {given[0]}, or regularisation")
        if len(given) == 2:
            what = f"data.{index}.repeats and data.{index}.sampling_weight both say how often pictures are seen"
            raise UserError(what, where, "give one of them")
    weighted = [index for index, data in trained if data.sampling_weight is not None]
    if weighted and len(trained) == 1:
        what = f"data.{weighted[0]}.sampling_weight has no effect: it is relative to other data sets, and there is none"
        raise UserError(what, where, "remove it, or use repeats")
    if weighted and len(weighted) < len(trained):
        other = next(index for index, data in trained if data.sampling_weight is None)
        what = f"data.{weighted[0]} has a sampling_weight, data.{other} has none"
        raise UserError(what, where, "give one to each data set but those of regularisation, or to none")


def _default(name: str) -> object:
    return Data.model_fields[name].default
