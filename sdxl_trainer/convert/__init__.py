"""`sdxl convert`: models, adapters and embeddings between the layouts that other programs read.

What SRC is decides what can be done with it: one row of `_KINDS` each. An option that the conversion does not use is
refused, and an existing DST is left alone unless `--overwrite` is given.
"""

from collections.abc import Callable
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.convert import adapters, embeddings, models
from sdxl_trainer.convert.request import Request
from sdxl_trainer.convert.sources import Source, identify
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import ADAPTER_FILE, WORD_FILES

# Kind of source -> how it is converted, and the kinds that it can become.
Row = tuple[Callable[[Source, Request], list[str]], tuple[str, ...]]
_KINDS: dict[str, Row] = {
    "folder": (models.convert, ("folder", "single")),
    "single": (models.convert, ("folder", "single")),
    "kohya": (adapters.convert, ("kohya", "diffusers")),
    "diffusers": (adapters.convert, ("kohya", "diffusers")),
    "peft": (adapters.convert, ("kohya", "diffusers")),
    "embedding": (embeddings.convert, ("embedding", "learned")),
}
_EXTRACT: Row = (adapters.extract, ("kohya", "diffusers"))


def run(request: Request) -> list[str]:
    """Convert, and give the lines that say what was written and what it cost."""
    source = identify(request.source)
    extracting = request.extract_from is not None and source.kind in ("folder", "single")
    how, kinds = _EXTRACT if extracting else _KINDS[source.kind]
    kind = request.to or _named_kind(request.target, kinds)
    if kind not in kinds:
        what = f"{source.label} cannot become '{kind}'"
        raise UserError(what, str(request.source), f"--to one of: {', '.join(kinds)}")
    _refuse_target(request)
    return how(source, request.aimed(kind))


def _named_kind(target: Path, kinds: tuple[str, ...]) -> str:
    """The kind that a name asks for: `.safetensors` is one file, anything else a folder; diffusers' own name is its."""
    if target.suffix not in ("", ".safetensors") and not target.is_dir():
        what = f"'{target.suffix}' is not a format that is written"
        raise UserError(what, str(target), "end the name in .safetensors, or name a folder")
    single = target.suffix == ".safetensors"
    if "single" in kinds:
        return "single" if single else "folder"
    if "embedding" in kinds:
        return "embedding" if single else "learned"
    return "kohya" if single and not target.name.startswith(Path(ADAPTER_FILE).stem) else "diffusers"


def _refuse_target(request: Request) -> None:
    target = request.target
    if target.resolve() in [path.resolve() for path in request.inputs()]:
        raise UserError("DST is also read", str(target), "name another file or folder to write")
    for path in request.inputs():
        if path.is_dir() and target.resolve().is_relative_to(path.resolve()):
            raise UserError("DST lies in a folder that is read", str(target), "name another place to write")
    if (target.exists() or target.is_symlink()) and not request.overwrite:
        raise UserError("DST exists", str(target), "name another file or folder, or replace it with --overwrite")
    if target.exists() and request.overwrite and target.is_dir() and not (target / "model_index.json").is_file():
        known = {ADAPTER_FILE, *WORD_FILES}
        other = sorted({path.name for path in target.iterdir()} - known)
        if other:
            what = f"DST is a folder with other things in it: {other[0]}"
            raise UserError(what, str(target), "name another folder; only a model's own folder is replaced")
    with files.explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
