"""What a data source yields: pictures with their captions, not yet opened."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mask:
    """The mask of a picture, or the picture itself where its transparency is the mask."""

    name: str
    read: Callable[[], bytes]
    stamp: str


@dataclass(frozen=True)
class Record:
    """One picture and its captions.

    `name` is what messages call it (a path, or dataset and row). `read` gives the encoded bytes of the
    picture (JPEG, PNG, ...) and can be sent to a worker process. `stamp` changes when the bytes may have
    changed (size and modification time of a file): while it stays, the hash of the bytes is not computed anew.
    `focus` is a point (x, y) in shares of width and height, `repeats` how often it is seen in a pass over its set.
    `seconds` are what the second text encoder reads, one for each caption; none if it reads the captions too.
    """

    name: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]
    stamp: str
    mask: Mask | None = None
    focus: tuple[float, float] | None = None
    repeats: int = 1
    seconds: tuple[str, ...] = ()
