"""One picture to draw as a value, and the settings it is made of as people write them. Nothing heavy is imported."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sdxl_trainer.errors import UserError, closest

Pair = tuple[int, int]


@dataclass(frozen=True)
class Request:
    """One picture to draw. Sizes are (height, width), corners (top, left). Its first noise is drawn on the CPU in fp32
    from `seed`, so that any device and other programs draw it alike."""

    prompt: str
    seed: int
    negative: str | None = None
    steps: int = 25
    guidance: float = 5.0
    height: int = 1024
    width: int = 1024
    prompt_2: str | None = None
    negative_2: str | None = None
    sampler: str | None = None
    rescale: float = 0.0
    clip_skip: int = 2
    emphasis: str = "off"
    long_prompts: str = "a1111"
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    original_size: Pair | None = None
    crop: Pair | None = None
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crop: Pair | None = None
    negative_target_size: Pair | None = None
    refiner: str | None = None
    refine_from: float | None = None
    refine_strength: float | None = None
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5
    model: str = ""
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    @property
    def how_strong(self) -> float:
        """How much of the picture is drawn anew, from 0 to 1: by default 0.75, and all of what a mask shows."""
        return (1.0 if self.mask else 0.75) if self.strength is None else self.strength

    @property
    def refined_from(self) -> float:
        """The share of the denoising after which a refiner takes over."""
        return 0.8 if self.refine_from is None else self.refine_from

    def told(self) -> dict[str, Any]:
        """What decides the picture, as plain data: the usual settings, and others where they are not the default."""
        always = {"prompt", "seed", "negative", "steps", "guidance", "height", "width"}
        default = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if name in always or value != default[name]}


def _size(text: str) -> Pair:
    """1024x1536 (width x height, as people say it) as (height, width)."""
    width, _, height = text.lower().partition("x")
    return int(height), int(width)


def _corner(text: str) -> Pair:
    top, _, left = text.partition(",")
    return int(top), int(left)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _side(text: str) -> int:
    if int(text) < 8:
        raise ValueError
    return int(text)


def _seed(text: str) -> int:
    if not 0 <= int(text) < 1 << 64:
        raise ValueError
    return int(text)


def _scale(text: str) -> float:
    if not 0 <= float(text) < 1e6:
        raise ValueError
    return float(text)


@dataclass(frozen=True)
class Setting:
    """How a setting is read from text, what to call what is wanted, and what it is."""

    read: Callable[[str], Any]
    wanted: str
    words: str
    group: str = "The picture"


# Every setting of a picture, as options of the command, keys of a prompt file and axes of a grid.
SETTINGS: dict[str, Setting] = {
    "negative": Setting(str, "text", "what not to draw"),
    "seed": Setting(_seed, "a whole number", "seed of the first picture of each prompt (default 0)"),
    "steps": Setting(_count, "a whole number from 1", "denoising steps (default 25)"),
    "guidance": Setting(_scale, "a number from 0", "classifier-free guidance scale (default 5)"),
    "height": Setting(_side, "pixels, at least 8", "pixels; default: the model's own, or the picture's"),
    "width": Setting(_side, "pixels, at least 8", "pixels; default: the model's own, or the picture's"),
    "sampler": Setting(str, "a name", "such as 'Euler a' or 'DPM++ 2M Karras'; default: the model's own"),
    "rescale": Setting(_share, "a number from 0 to 1", "guidance rescale (Lin et al. 2024); 0.7 suits v-prediction"),
    "prompt_2": Setting(str, "text", "what the second text encoder reads; default: the prompt", "The prompt"),
    "negative_2": Setting(str, "text", "the same for the negative prompt", "The prompt"),
    "emphasis": Setting(str, "a name", "read (word:1.2) as off, a1111, a1111_no_norm or comfyui", "The prompt"),
    "long_prompts": Setting(str, "a name", "chunks of a1111, comfyui or kohya, or cut", "The prompt"),
    "clip_skip": Setting(
        _count, "a whole number from 1", "layer of the encoders, from the end (default 2)", "The prompt"
    ),
    "image": Setting(str, "a file", "picture to begin with", "From a picture"),
    "mask": Setting(str, "a file", "what of it to draw anew: white", "From a picture"),
    "strength": Setting(
        _share, "a number from 0 to 1", "how much is drawn anew (0.75; under a mask 1)", "From a picture"
    ),
    "refiner": Setting(str, "a model", "SDXL refiner that goes on with the picture", "Refiner"),
    "refine_from": Setting(_share, "a number from 0 to 1", "share of the denoising before it (default 0.8)", "Refiner"),
    "refine_strength": Setting(
        _share, "a number from 0 to 1", "instead: how much of the finished picture it draws anew", "Refiner"
    ),
    "aesthetic": Setting(float, "a number", "score that a refiner is told (default 6)", "Refiner"),
    "negative_aesthetic": Setting(float, "a number", "score for the negative prompt (default 2.5)", "Refiner"),
    "original_size": Setting(_size, "WIDTHxHEIGHT", "size that the model is told", "Micro-conditioning"),
    "crop": Setting(_corner, "TOP,LEFT", "corner of the crop that it is told", "Micro-conditioning"),
    "target_size": Setting(_size, "WIDTHxHEIGHT", "target size that it is told", "Micro-conditioning"),
    "negative_original_size": Setting(_size, "WIDTHxHEIGHT", "the same for the negative prompt", "Micro-conditioning"),
    "negative_crop": Setting(_corner, "TOP,LEFT", "the same for the negative prompt", "Micro-conditioning"),
    "negative_target_size": Setting(_size, "WIDTHxHEIGHT", "the same for the negative prompt", "Micro-conditioning"),
}
# Names that other programs have for them.
ALIASES = {
    "negative_prompt": "negative",
    "negative_prompt_2": "negative_2",
    "sample_steps": "steps",
    "num_inference_steps": "steps",
    "scale": "guidance",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance_scale": "guidance",
    "guidance_rescale": "rescale",
    "sample_sampler": "sampler",
    "denoise": "strength",
    "crops_coords_top_left": "crop",
    "negative_crops_coords_top_left": "negative_crop",
}
COMMAND = "sdxl sample"
# Keys that are no single value: a list of files.
LISTS = {"loras": "lora", "lora": "lora", "embeddings": "embedding", "embedding": "embedding"}


def value(name: str, raw: Any, where: str) -> Any:
    """A setting's value from text or plain data. UserError says what was wanted."""
    setting = SETTINGS[name]
    text = ",".join(map(str, raw)) if isinstance(raw, list | tuple) else str(raw)
    if isinstance(raw, list | tuple) and setting.read is _size:
        text = "x".join(str(side) for side in reversed(raw))  # plain data has (height, width), as diffusers has it
    try:
        return setting.read(text)
    except ValueError:
        if where == COMMAND:
            what = f"'{raw}' for '--{name.replace('_', '-')}' is not {setting.wanted}"
            raise UserError(what, where, f"give {setting.wanted}; see: sdxl sample --help") from None
        raise UserError(f"{name} = '{raw}' is not {setting.wanted}", where, f"give {setting.wanted}") from None


def settings(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings from plain data, under their own names or those of other programs."""
    found: dict[str, Any] = {}
    for key, given in raw.items():
        name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
        if name == "prompt":
            found[name] = str(given)
        elif name in LISTS:
            found[LISTS[name] + "s"] = tuple(given) if isinstance(given, list) else (str(given),)
        elif name in SETTINGS:
            found[name] = None if given is None else value(name, given, where)
        else:
            raise UserError(f"there is no setting '{key}'", where, closest(name, [*SETTINGS, "prompt", "lora"]))
    return found
