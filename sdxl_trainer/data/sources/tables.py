"""Records of parquet files at any address that fsspec opens.

A row of a parquet file cannot be read by itself: each file is copied once, a few rows in memory at a time, into an
Arrow file where datasets are kept, and its rows are read from there as those of any dataset.
"""

import hashlib
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from sdxl_trainer import addresses, files
from sdxl_trainer.config import Data
from sdxl_trainer.data.problems import Notes
from sdxl_trainer.data.records import Lasting
from sdxl_trainer.data.sources import dataset
from sdxl_trainer.data.sources.addresses import File
from sdxl_trainer.errors import UserError

# Rows in memory at a time.
BATCH = 100


def records(data: Data, found: list[File], place: str, datasets_dir: str | None, notes: Notes | None = None) -> Lasting:
    """The rows of all files, in their order."""
    import datasets
    import pyarrow

    folder = Path(datasets_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "addresses"
    names = [hashlib.sha256(f"1 {address} {stamp}".encode()).hexdigest()[:32] for address, stamp in found]
    copies = [folder / f"{name}.arrow" for name in names]
    for (address, _), copy in zip(found, copies, strict=True):
        if not copy.is_file():
            _copy(address, copy, place)

    def parts() -> list[dataset.Part]:
        made, offset = list[dataset.Part](), 0
        for name, copy in zip(names, copies, strict=True):
            try:
                table = dataset.arrow(str(copy))
            except (OSError, pyarrow.ArrowException) as error:
                what = f"the copy of a parquet file is damaged: {error}"
                raise UserError(what, str(copy), "delete it: it is copied once more") from None
            rows = SimpleNamespace(
                column_names=table.column_names, features=datasets.Features.from_arrow_schema(table.schema)
            )
            dataset.require_columns(data, rows, place)
            made += dataset.cut(str(copy), "train", offset, 0, table.num_rows, name)
            offset += table.num_rows
        return made

    return Lasting([data.model_dump(mode="json"), names], dataset.rows(data, parts, "train", place, [folder], notes))


def _copy(address: str, copy: Path, place: str) -> None:
    """A parquet file as an Arrow file, whole or absent."""
    import pyarrow
    import pyarrow.parquet

    def rows(draft: Path) -> None:
        system, path = addresses.opened(address, place)
        with system.open(path, "rb") as stream:
            source = pyarrow.parquet.ParquetFile(stream)
            with (
                pyarrow.OSFile(os.fspath(draft), "wb") as sink,
                pyarrow.ipc.new_stream(sink, source.schema_arrow) as writer,
            ):
                for batch in source.iter_batches(BATCH):
                    writer.write_batch(batch)

    def write(draft: Path) -> None:
        try:
            rows(draft)
        except pyarrow.ArrowException as error:
            said = " ".join(str(error).split())
            what = f"the parquet file {address} cannot be copied to {copy.parent}: {said}"
            raise UserError(what, place, "write the file once more") from None

    with files.explained(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(copy, lambda draft: addresses.asked(partial(write, draft), address, place))
