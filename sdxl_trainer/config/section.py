"""What sections are made of: types of values, and how a field is declared."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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


def _below(path: str) -> str:
    """Refuse what leads out of the output folder."""
    if Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts:
        raise ValueError("a folder below output_dir, without ..")
    return path


InsidePath = Annotated[PathText, AfterValidator(_below)]
# Sides of pictures: latents have an eighth of them. No UNet learns larger ones, and lists of their buckets are long.
Side = Annotated[int, Field(ge=8, le=16_384, multiple_of=8)]


def option(default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, description=description, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
