"""Data sets of kohya's sd-scripts: the dataset TOML, or one folder on the command line."""

from math import sqrt
from typing import Any

from sdxl_trainer.arrivals.account import Account, Entry, plain
from sdxl_trainer.errors import UserError

# Per data set there, handed down to its subsets.
_SETS = tuple(
    """
    resolution enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
    resize_interpolation validation_split validation_seed network_multiplier
    """.split()
)
_SUBSETS = tuple(
    """
    num_repeats dataset_repeats shuffle_caption caption_separator keep_tokens flip_aug keep_tokens_separator
    secondary_separator enable_wildcard color_aug face_crop_aug_range random_crop caption_prefix caption_suffix
    caption_dropout_rate caption_extension caption_dropout_every_n_epochs caption_tag_dropout_rate token_warmup_min
    token_warmup_step cache_info alpha_mask class_tokens caption_extention masked_loss
    """.split()
)
PLACES = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir", "dataset_class")
_KEPT = {
    "keep_tokens": "keep_tags",
    "keep_tokens_separator": "keep_separator",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "flip",
    "class_tokens": "caption",
    "bucket_no_upscale": "no_upscale",
    "validation_split": "held_out",
}
_DROPPED = {
    "color_aug": "colours are not changed",
    "face_crop_aug_range": "no crops around faces; data.focus keeps a point that you name",
    "token_warmup_min": "all tags are there from the first step",
    "token_warmup_step": "all tags are there from the first step",
    "caption_dropout_every_n_epochs": "captions are left out by chance, not in whole epochs",
    "secondary_separator": "tags are shuffled one by one, not in groups",
    "cache_info": "what is known of the files is always kept",
    "network_multiplier": "the adapter works at its full strength",
    "validation_seed": "which pictures are held out depends on their bytes alone",
    "custom_attributes": "nothing reads them",
    "token_warmup": "all tags are there from the first step",
}
_FILTERS = {"area": "box", "cubic": "bicubic", "linear": "bilinear", "lanczos4": "lanczos"}
FILTERS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")


def datasets(account: Account, given: dict[str, Any] | None) -> int:
    """Every data set; the largest batch size that they name, or 0."""
    if given is None:
        return _command_line(account)
    general = account.inner(given.pop("general", {}), "general")
    batches, index = set(), 0
    handed = {name: account.options.pop(name) for name in (*_SETS, *_SUBSETS) if name in account.options}
    for place in PLACES:
        if place in account.options:
            account.dropped(place, "the dataset config says where the pictures are, and has the last word")
    sets = given.pop("datasets", [])
    if not isinstance(sets, list) or not all(isinstance(entry, dict) for entry in sets):
        raise UserError("'datasets' is not a list of tables", account.where, "write [[datasets]] above each")
    for number, entry in enumerate(sets):
        own = {**handed, **general.options, **entry}
        subsets = own.pop("subsets", [])
        batches.add(int(plain(own.pop("batch_size", 0))))
        for part, subset in enumerate(subsets):
            inside = account.inner({**own, **subset}, f"datasets.{number}.subsets.{part}")
            _subset(inside, index, {})
            index += 1
    if not index:
        raise UserError("the dataset config names no pictures", account.where, "add [[datasets.subsets]] to it")
    account.inner(given, "dataset_config").finish()
    if len(batches) > 1:
        why = "one batch size for all data sets: the largest"
        account.entries.append(
            Entry("changed", "datasets.batch_size", sorted(batches), "train.micro_batch", max(batches), why)
        )
    return max(batches)


def prior_weight(account: Account) -> None:
    """The weight of all regularisation pictures."""
    regular = [i for i, data in enumerate(account.tree["data"]) if data.get("regularisation")]
    if regular and account.has("prior_loss_weight"):
        for index in regular:
            account.put(f"data.{index}.weight", float(account.number("prior_loss_weight")))
        account.part("prior_loss_weight", "data.weight of the regularisation pictures")
    account.unused("prior_loss_weight")


def _command_line(account: Account) -> int:
    names = [name for name in (*_SETS, *_SUBSETS) if name in account.options]
    common = {name: account.options.pop(name) for name in names}
    places = [("train_data_dir", False), ("reg_data_dir", True)]
    found = [(place, regular) for place, regular in places if account.has(place)]
    if not found:
        fix = "give the dataset TOML too: --data FILE; or write train_data_dir in the config"
        raise UserError("the config names no pictures", account.where, fix)
    for index, (place, regular) in enumerate(found):
        inside = account.inner(common if index == 0 else dict(common), "")
        inside.place = account.place
        if index:
            inside.entries, inside.off = [], []  # said of the first already
        folder = account.text(place)
        if account.has("in_json") and account.look("generate_caption_database"):
            account.kept(place, f"data.{index}.path", folder)
            account.part("in_json", "made there from the caption files beside the pictures, which are read themselves")
        elif account.has("in_json"):
            account.kept(place, f"data.{index}.path", folder)
            account.kept("in_json", f"data.{index}.metadata", account.text("in_json"))
        else:
            account.changed(place, f"data.{index}.path", folder, "its folders named 10_words say repeats and words")
            account.put(f"data.{index}.kohya_folders", True)
        _subset(inside, index, {"path": folder, "is_reg": regular})
    for place in PLACES:
        if place in account.options:
            account.dropped(
                place, "masks are read beside their pictures (data.mask), no classes of data sets are loaded"
            )
    return 0


def _subset(account: Account, index: int, known: dict[str, Any]) -> None:
    """One folder of pictures as [[data]] number `index`."""
    to = f"data.{index}."
    if not known:
        if account.has("metadata_file"):
            account.kept("metadata_file", f"{to}metadata", account.text("metadata_file"))
        if not account.has("image_dir"):
            raise UserError(f"{account.place}image_dir is missing", account.where, "name the folder of the pictures")
        account.kept("image_dir", f"{to}path", account.text("image_dir"))
    regular = known.get("is_reg", bool(account.look("is_reg", False)))
    if regular:
        account.put(f"{to}regularisation", True)
        if "is_reg" in account.options:
            account.kept("is_reg", f"{to}regularisation", True)
    _sizes(account, to)
    interpolation(account, to)
    repeats = "num_repeats" if account.has("num_repeats") else "dataset_repeats"
    if account.has(repeats):
        account.kept(repeats, f"{to}repeats", float(account.number(repeats)))
    account.keep_all({name: to + option for name, option in _KEPT.items()})
    _captions(account, to)
    if account.look("alpha_mask"):
        account.kept("alpha_mask", f"{to}mask", "alpha")
        account.assumed(f"{to}mask_normalised", False, "the mask's loss is a plain mean there")
    if account.look("masked_loss"):
        account.dropped("masked_loss", 'masks of another folder are not read: set mask = "file", with a-masklabel.png')
    if account.look("random_crop"):
        account.kept("random_crop", f"{to}crop", "random")
    account.drop_all(_DROPPED)
    account.finish()


def _captions(account: Account, to: str) -> None:
    _tags(account, to)
    for name, words in (("caption_prefix", "{} "), ("caption_suffix", " {}")):
        if account.has(name):
            account.kept(name, to + name, words.format(account.text(name)))
    if account.look("enable_wildcard"):
        account.kept("enable_wildcard", f"{to}wildcards", True)
        account.put(f"{to}caption_per_line", True)
    if "metadata" in account.tree["data"][int(to.split(".")[1])]:
        account.unused("caption_extension", "caption_extention")
    for name in ("caption_extension", "caption_extention"):
        if account.has(name) and account.text(name) in {".txt", ".caption", "txt", "caption"}:
            account.part(name, ".txt and .caption files are read")
        elif account.has(name):
            account.kept(name, f"{to}caption_extension", account.text(name))


def _tags(account: Account, to: str) -> None:
    if account.look("shuffle_caption"):
        account.kept("shuffle_caption", f"{to}shuffle_tags", True)
    data = account.tree["data"][int(to.split(".")[1])]
    if not data.get("shuffle_tags") and not data.get("tag_dropout"):
        for option, name in (("keep_tags", "keep_tokens"), ("keep_separator", "keep_tokens_separator")):
            if data.pop(option, None) is not None:
                account.undone(f"{to}{option}", f"{name} changes nothing where tags are neither shuffled nor left out")
        account.unused("caption_separator")
    if account.has("caption_separator"):
        account.kept("caption_separator", f"{to}tag_separator", account.text("caption_separator").strip() or " ")


def _sizes(account: Account, to: str) -> None:
    """Resolution and buckets."""
    given = account.options.get("resolution")
    sides = [int(float(part)) for part in str(given or "").strip("[]() ").replace("x", ",").split(",") if part.strip()]
    if not sides:
        raise UserError(f"{account.place}resolution is missing", account.where, "add it to the config")
    width, height = sides[0], sides[-1]
    side = round(sqrt(width * height) / 8) * 8
    bucketed = bool(account.look("enable_bucket"))
    if width == height == side:
        account.kept("resolution", f"{to}resolution", side)
    else:
        why = "the side of a square of that area, in multiples of 8" if bucketed else "the one size of all pictures"
        account.changed("resolution", f"{to}resolution", side, why)
    if bucketed:
        account.kept("enable_bucket", f"{to}buckets", "area")
        defaults = {"bucket_reso_steps": ("bucket_step", 64), "min_bucket_reso": ("bucket_min", 256)}
        defaults |= {"max_bucket_reso": ("bucket_max", 1024)}
        for name, (option, default) in defaults.items():
            if account.look("bucket_no_upscale") and option != "bucket_step":
                account.drop_all({name: "with bucket_no_upscale it is not looked at there either"})
            elif account.has(name):
                _side(account, name, to + option)
            else:
                account.assumed(to + option, default, f"the default of {name}")
        return
    if width != height:
        account.tree["data"][int(to.split(".")[1])].pop("resolution")
        account.put(f"{to}buckets", "sizes")
        account.amended(f"{to}resolution", side, "see bucket_sizes")
        account.tree["data"][int(to.split(".")[1])].pop("resolution")
        account.put(f"{to}bucket_sizes", [[width // 8 * 8, height // 8 * 8]])
    names = ("enable_bucket", "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale")
    account.drop_all(dict.fromkeys(names, "without enable_bucket there are no buckets"))


def _side(account: Account, name: str, to: str) -> None:
    """A number of pixels, of which the latents have an eighth."""
    given = int(account.number(name))
    side = max(8, given // 8 * 8)
    if side == given:
        account.kept(name, to, side)
    else:
        account.changed(name, to, side, "sides are multiples of 8")


def interpolation(account: Account, to: str) -> None:
    """The filter that resizes pictures, under OpenCV's or Pillow's name."""
    if account.has("resize_interpolation"):
        given = account.text("resize_interpolation").lower()
        name = _FILTERS.get(given, given)
        if name in FILTERS:
            account.kept("resize_interpolation", f"{to}interpolation", name)
        else:
            account.dropped("resize_interpolation", "pictures are resized by Lanczos")
