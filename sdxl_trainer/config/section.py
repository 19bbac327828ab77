"""What sections are made of: types of values, and how a field is declared."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Text = str | None


def _possible(path: str) -> str:
    """Refuse what cannot be a path; the messages continue "it should be"."""
    if not path:
        raise ValueError("a path; it is empty")
    if "\0" in path:
        raise ValueError("a path; it holds a zero byte")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"a path; there is no home folder '{Path(path).parts[0]}'") from None
    return path


PathText = Annotated[str, AfterValidator(_possible)]


def _either(message: str) -> WrapValidator:
    """One message of a value that may be of two types, for which there would be one of each."""

    def some(given: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(given)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(some)


Share = Annotated[bool | Fraction, _either("true, false or a number from 0 to 1")]
_Epochs = Annotated[str, Field(pattern=r"^[1-9]\d* epochs?$")]
Every = Annotated[Positive | _Epochs, _either("a number of steps from 1 on, or epochs as text, such as '2 epochs'")]
EveryOrNever = Annotated[
    Annotated[int, Field(ge=0)] | _Epochs,
    _either("a number of steps, 0 for never, or epochs as text, such as '2 epochs'"),
]


def steps_of(every: int | str | None, epoch: int) -> int:
    """Steps of an interval such as 250 or `2 epochs`, where an epoch has so many; 0: never."""
    return int(every.split()[0]) * epoch if isinstance(every, str) else every or 0


def _below(path: str) -> str:
    """Refuse what leads out of the output folder."""
    if Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts:
        raise ValueError("a folder below output_dir, without ..")
    return path


_UNITS = {"GB": 1e9, "MB": 1e6, "GiB": 2.0**30, "MiB": 2.0**20}


def _amount(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? ?[GM]i?B", text):
        raise ValueError("a number with its unit, such as 12GB or 7.5GiB")
    return text


def _amount_or_auto(text: str) -> str:
    try:
        return text if text == "auto" else _amount(text)
    except ValueError as error:
        raise ValueError(f"auto, or {error}") from None


Amount = Annotated[str, AfterValidator(_amount)]
AmountOrAuto = Annotated[str, AfterValidator(_amount_or_auto)]


def bytes_of(amount: str) -> float:
    """12GB, 7.5 GiB: the number of bytes."""
    number, unit = re.fullmatch(r"([\d.]+) ?(\w+)", amount).groups()  # type: ignore[union-attr]  # the config saw to it
    return float(number) * _UNITS[unit]


InsidePath = Annotated[PathText, AfterValidator(_below)]
# Sides of pictures: latents have an eighth of them. No UNet learns larger ones, and lists of their buckets are long.
Side = Annotated[int, Field(ge=8, le=16_384, multiple_of=8)]


def is_path(field: FieldInfo) -> bool:
    """Whether an option is a path that may lead anywhere, and not only below output_dir."""
    marks = [*field.metadata, *(m for kind in get_args(field.annotation) for m in getattr(kind, "__metadata__", ()))]
    checks = {getattr(mark, "func", None) for mark in marks}
    return _possible in checks and _below not in checks


def option(default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, description=description, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
