"""Records of a dataset: saved by `datasets.save_to_disk`, a folder of parquet or arrow files, or on the hub.

The `datasets` library finds, downloads and converts; what it leaves are Arrow files, and a record reads its row from
there. A worker process therefore needs neither the library nor the network, and a record is a few strings.
"""

import errno
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

from sdxl_trainer.config import Data
from sdxl_trainer.data.problems import Found, Notes, refuse, total
from sdxl_trainer.data.records import Lasting, Mask, Record
from sdxl_trainer.data.sources import extras
from sdxl_trainer.data.sources.tree import read_file
from sdxl_trainer.errors import UserError, closest

log = logging.getLogger("sdxl_trainer")
# Rows of a table that are looked at together.
ROWS = 4096
PROBLEMS = {
    "outside": ("rows name pictures outside of the dataset", "put the pictures into the dataset's folder"),
    "missing": ("rows name pictures that do not exist", "restore the files, or remove the rows"),
    "none": ("rows have no picture", "remove the rows"),
    "type": ("captions are not text", "choose a caption_column of strings or lists of strings"),
    "empty": ("captions are empty", "write them, or give 'caption' for all pictures that have none"),
} | extras.PROBLEMS


@dataclass(frozen=True)
class Part:
    """Rows first..last-1 of one Arrow file; `offset` is the number of its first row within the split. `table` opens it,
    and `read` gives the bytes of a picture, by its (column, row, name)."""

    table: Callable[[], Any]
    read: Callable[..., bytes]
    split: str
    offset: int
    first: int
    last: int
    fingerprint: str


def is_saved(root: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return (root / "dataset_dict.json").is_file() or all(
        (root / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def holds(table: Path, column: str) -> bool:
    """Whether a parquet file has a column, so that pictures beside it are only illustrations of the dataset."""
    import pyarrow.parquet

    try:
        return table.suffix == ".parquet" and column in pyarrow.parquet.read_schema(table).names
    except (pyarrow.ArrowException, OSError):
        return False


def saved(data: Data, root: Path, split: str, place: str, notes: Notes | None = None) -> Lasting:
    """Records of a dataset or dict of datasets written by save_to_disk."""
    import datasets
    import pyarrow

    def splits() -> dict[str, Any]:
        try:
            found: Any = datasets.load_from_disk(root, keep_in_memory=False)
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            what = f"the saved dataset cannot be opened: {error}"
            raise UserError(what, place, "save or copy it once more") from None
        if isinstance(found, dict):
            return found
        own = str(found.split or "train")
        return {own if own.isidentifier() else "train": found}

    return _lasting(data, root, splits, split, place, root, notes=notes)


def loaded(
    data: Data, split: str, place: str, datasets_dir: str | None, local: Path | None, notes: Notes | None = None
) -> Lasting:
    """Records of what `datasets` opens: a local folder, or a dataset on the hub where that is None."""
    import datasets
    import pyarrow

    path = str(local or data.path)
    wrong = (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException)
    try:
        builder = datasets.load_dataset_builder(path, name=data.name, data_dir=data.folder, cache_dir=datasets_dir)
        builder.download_and_prepare()
    except wrong as error:
        raise not_loaded(error, place, local) from None

    def splits() -> dict[str, Any]:
        try:
            # All of them, for slices such as train[:90%] are taken below, where the rows' places are known.
            return builder.as_dataset()
        except wrong as error:
            raise not_loaded(error, place, local) from None

    return _lasting(data, Path(builder.cache_dir), splits, split, place, local, datasets_dir, notes)


def read_row(path: str, column: str, row: int, name: str) -> bytes:
    """The bytes of the picture in one row of an Arrow file. UserError names it if the file is gone or damaged."""
    return picture(partial(arrow, path), column, row, name)


def picture(table: Callable[[], Any], column: str, row: int, name: str) -> bytes:
    """The bytes of the picture in one row of a table."""
    import pyarrow

    try:
        value = table().column(column)[row]
        return (value["bytes"] if pyarrow.types.is_struct(value.type) else value).as_py()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"the row cannot be read: {error}", name, "make or download the dataset once more") from None


@lru_cache(maxsize=256)
def arrow(path: str) -> Any:
    """A memory-mapped Arrow file; opened once per process."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()


def not_loaded(error: Exception, place: str, local: Path | None) -> UserError:
    """The library's error in our words."""
    said = " ".join(str(error).split())
    if isinstance(error, ConnectionError):
        return UserError(
            f"there is no such folder, and the dataset cannot be fetched from the hub: {said}",
            place,
            "check spelling and network, unset HF_HUB_OFFLINE if it is set, or give the path of a local folder",
        )
    if "gated" in said:
        return UserError(said, place, "ask for access on the dataset's page, then log in with 'hf auth login'")
    if type(error).__name__ == "DatasetNotFoundError":
        return UserError(
            f"there is no such folder, and no such dataset on the hub: {said}",
            place,
            "check the spelling; log in with 'hf auth login' if the dataset is private",
        )
    if "BuilderConfig" in said or "Config name is missing" in said:
        return UserError(said, place, "set 'name' to one of the configurations")
    if "scripts are no longer supported" in said:
        return UserError(said, place, "use a copy of the dataset in parquet files")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(said, place, "make space, or set cache.datasets_dir to a folder with more of it")
    if "data file" in said:
        return UserError(said, place, "set 'folder' to the sub-folder with the data files, or remove it")
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    what = "the files cannot be opened as a dataset" if local else "the dataset cannot be opened"
    return UserError(f"{what}: {said}{cause}", place, "download or make the damaged files once more")


def _lasting(
    data: Data,
    folder: Path,
    splits: Callable[[], dict[str, Any]],
    split: str,
    place: str,
    root: Path | None,
    datasets_dir: str | None = None,
    notes: Notes | None = None,
) -> Lasting:
    """The records of a dataset whose Arrow files lie in a folder. `splits` opens it, which maps all of its files and is
    left out where the records are known."""
    there = sorted(path for path in folder.rglob("*") if path.suffix in {".arrow", ".json"})
    of, stamp = [data.model_dump(mode="json"), split], [_stamp(path) for path in there]
    roots = [root] if root else _caches(datasets_dir)

    def parts() -> list[Part]:
        opened = splits()
        found = list(_parts(opened, split, place))
        for name in dict.fromkeys(part.split for part in found):
            require_columns(data, opened[name], place)
        return found

    return Lasting(of, stamp, partial(rows, data, parts, split, place, roots, notes))


def rows(
    data: Data,
    parts: Callable[[], Sequence[Part]],
    split: str,
    place: str,
    roots: Sequence[Path],
    notes: Notes | None,
) -> Iterator[Record]:
    """The records of parts, which are found when the first is asked for."""
    chosen = parts()
    if not chosen:
        raise UserError(f"split '{split}' has no rows", place, "choose another split, or remove the data set")
    problems: Found = defaultdict(list)
    count = sum(part.last - part.first for part in chosen)
    found = 0
    for part in chosen:
        for record in _part(data, part, roots, problems):
            found += 1
            yield record
    refuse(problems, PROBLEMS, place, notes)
    if notes is not None:
        notes.unusable[place] += count - found
    log.info("%s: %d pictures of split '%s'", place, found, split)


def _part(data: Data, part: Part, roots: Sequence[Path], problems: Found) -> Iterator[Record]:
    """The records of a part; problems are noted, and their rows left out."""
    table = part.table().slice(part.first, part.last - part.first)
    captions, more = (_captions(column, table) for column in (data.caption_column, data.caption_column_2))
    points = table.column(data.focus_column).to_pylist() if data.focus == "column" else [None] * table.num_rows
    pictures = _sources(data.image_column, part, table, data.path, roots, problems)
    masks: Iterator[Any] = repeat(None)
    if data.mask == "column":
        masks = _sources(data.mask_column, part, table, data.path, roots, problems, "unmasked")
    before = total(problems)
    for value, other, point, picture, mask in zip(captions, more, points, pictures, masks, strict=False):
        name, read, stamp = picture
        texts = _cleaned(data, value, name, problems)
        record = Record(name, texts, read, stamp, focus=extras.focus(point, name, problems))
        if data.caption_column_2 is not None:
            record = replace(record, seconds=extras.seconds(other, value, texts, name, problems))
        if data.mask != "none":
            record = replace(record, mask=Mask(*(mask or picture)))
        if total(problems) == before:
            yield record
        before = total(problems)


def _sources(
    column: str,
    part: Part,
    table: Any,
    dataset: str,
    roots: Sequence[Path],
    problems: dict[str, list[str]],
    absent: str = "none",
) -> Iterator[tuple[str, Any, str]]:
    """Per row of a column of pictures: its name, what reads it, and its stamp. Problems are noted, `absent` for rows
    without a picture."""
    for row, outer in enumerate(_paths(table.column(column)), start=part.first):
        name = f"{dataset}[{part.split}] row {part.offset + row}"
        read: Any = partial(part.read, column, row, name)
        stamp = f"{part.fingerprint}:{column}:{part.offset + row}"
        if outer is None:
            problems[absent].append(name)
        elif outer:
            path = _within(outer, roots, name, problems)
            if path:
                read, stamp = partial(read_file, path, name), _stamp(path)
        yield name, read, stamp


def cut(whole: Part) -> Iterator[Part]:
    """A part in smaller ones."""
    for start in range(whole.first, whole.last, ROWS):
        yield replace(whole, first=start, last=min(start + ROWS, whole.last))


def _parts(splits: dict[str, Any], split: str, place: str) -> Iterator[Part]:
    """The Arrow files behind a split such as train, train[:90%] or train+validation, in order."""
    import datasets

    try:
        lengths = {name: len(rows) for name, rows in splits.items()}
        chosen = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        fix = closest(split, [str(name) for name in splits])
        raise UserError(f"no split '{split}': {error}", place, f"set 'split'; {fix}") from None
    for piece in chosen:
        rows = splits[piece.splitname]
        begin, end = piece.from_ or 0, len(rows) if piece.to is None else piece.to
        offset = 0
        for file in rows.cache_files:
            count = arrow(file["filename"]).num_rows
            first, last = max(begin - offset, 0), min(end - offset, count)
            opened, read = partial(arrow, file["filename"]), partial(read_row, file["filename"])
            yield from cut(Part(opened, read, piece.splitname, offset, first, last, rows._fingerprint))
            offset += count
        if offset != len(rows):
            raise RuntimeError(f"{len(rows)} rows, but {offset} in the Arrow files of {piece.splitname}")


def require_columns(data: Data, rows: Any, place: str) -> None:
    wanted = [("image_column", data.image_column)]
    if data.caption is None:
        wanted.append(("caption_column", data.caption_column))
    wanted += extras.columns(data)
    there = ", ".join(rows.column_names)
    for option, name in wanted:
        if name not in rows.column_names:
            raise UserError(
                f"the dataset has no column '{name}'; columns: {there}", place, _fitting(option, name, rows.features)
            )
    for option, name in wanted:
        kind = rows.features.arrow_schema.field(name).type
        if option in {"image_column", "mask_column"} and not _is_picture(kind):
            what = f"column '{name}' holds {kind}, not pictures; columns: {there}"
            raise UserError(what, place, _fitting(option, name, rows.features))


def _fitting(option: str, name: str, features: Any) -> str:
    """How to set a column option: to the one column of the right type, or to the nearest name."""
    kind = "Image" if option in {"image_column", "mask_column"} else "Value"
    fitting = [
        column
        for column, feature in features.items()
        if type(feature).__name__ == kind and (kind == "Image" or feature.dtype in {"string", "large_string"})
    ]
    return f"set {option} = '{fitting[0]}'" if len(fitting) == 1 else f"set {option}; {closest(name, features)}"


def _is_picture(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind}
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_string(kind) or types.is_large_string(kind)


def _paths(column: Any) -> list[str | None]:
    """Per row: "" where the picture is stored in it, the path where it is a file, None where there is nothing."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_string(column.type) or types.is_large_string(column.type):
        return [path or None for path in column.to_pylist()]
    stored = compute.struct_field(column, "bytes") if types.is_struct(column.type) else column
    # A parquet file in which no row stores a picture may leave the type of the bytes open.
    sizes = [None] * len(stored) if types.is_null(stored.type) else compute.binary_length(stored).to_pylist()
    if not types.is_struct(column.type):
        return ["" if size else None for size in sizes]
    paths = compute.struct_field(column, "path").to_pylist()
    return ["" if size else (path or None) if size is None else None for size, path in zip(sizes, paths, strict=True)]


def _caches(datasets_dir: str | None) -> list[Path]:
    """Where the library puts the files of hub datasets."""
    import datasets
    import huggingface_hub

    folders = [datasets_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE]
    return [Path(folder).resolve() for folder in folders if folder]


def _within(path: str, roots: Sequence[Path], name: str, problems: dict[str, list[str]]) -> Path | None:
    """The file that a row names; a problem is noted where it lies outside of the dataset or does not exist."""
    inside = [found for root in roots if (found := (root / path).resolve()).is_relative_to(root.resolve())]
    existing = [found for found in inside if found.is_file()]
    if existing:
        return existing[0]
    problems["missing" if inside else "outside"].append(f"{path} ({name})")
    return None


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


def _captions(column: str | None, table: Any) -> list[object]:
    if column not in table.column_names:
        return [None] * table.num_rows
    return table.column(column).to_pylist()


def _cleaned(data: Data, value: object, name: str, problems: dict[str, list[str]]) -> tuple[str, ...]:
    captions = extras.clean(value)
    if captions:
        return captions
    if captions is not None and data.caption is not None:
        return (data.caption.strip(),)
    problems["type" if captions is None else "empty"].append(name)
    return ()
