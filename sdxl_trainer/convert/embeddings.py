"""Embeddings of textual inversion: one file for ComfyUI, A1111 and Forge, or diffusers' file for each text encoder."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.convert.models import dated
from sdxl_trainer.convert.request import Request
from sdxl_trainer.convert.sources import AGAIN, Source
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.formats import WORD_FILES, folder, header, metadata

# Names of the two encoders' vectors in one file: ours and ComfyUI's first, then those of older scripts.
_PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_OUTPUTS = ("clip_l_out", "clip_g_out")  # OneTrainer's vectors that are added behind the encoder


def convert(source: Source, request: Request) -> list[str]:
    """Write the vectors in the other layout."""
    learned = request.to == "learned"
    request.only(f"an embedding as '{request.to}'", "dtype", *(("token",) if learned else ("entries", "metadata")))
    first, second, kept = read(source.path)
    token = request.token or _word(kept, source.path) or kept.get("modelspec.trigger_phrase") or source.path.stem
    dtype = request.torch_dtype()
    if learned:

        def write(target: Path) -> None:
            for name, vectors in zip(WORD_FILES, (first, second), strict=True):
                folder.write_tensors(target / name, {token: vectors}, dtype=dtype)

        files.write_atomically(request.target, write)
        return [f"wrote {request.target} ({plural(len(first), 'vector')} per encoder, token '{token}')"]
    spec = metadata.modelspec(request.target.stem, kind="textual-inversion", date=dated(source))
    own = {key: text for key, text in kept.items() if key not in ("format", metadata.HASH)}
    entries = {**spec, **own, **request.entries}
    entries = metadata.reduced(entries, request.metadata or "full") | dict(request.entries)
    folder.write_tensors(request.target, {"clip_l": first, "clip_g": second}, entries, dtype)
    return [f"wrote {request.target} ({plural(len(first), 'vector')} per encoder)"]


def read(path: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """The vectors [n, 768] and [n, 1280] of the two text encoders, and the metadata of their file."""
    file = path / WORD_FILES[0] if path.is_dir() else path
    paths = [file.with_name(name) for name in WORD_FILES] if file.name in WORD_FILES else [file]
    if file.is_file() and set(_PAIRS[0]) <= header.read(file, AGAIN).keys():
        paths = [file]  # as this trainer writes it, with both encoders' vectors
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        what = f"half of the embedding is missing: {missing[0]}"
        raise UserError(what, str(path), "SDXL has two text encoders: copy both files into one folder")
    kept = header.described(paths[0], AGAIN)[1]
    tensors = {name: tensor for p in paths for name, tensor in _named(p, len(paths)).items()}
    refused = [name for name in _OUTPUTS if name in tensors]
    if refused:
        what = f"the embedding holds vectors that are added behind the encoder: {refused[0]}"
        raise UserError(what, str(path), "only OneTrainer reads those; train an embedding without output vectors")
    for first, second in _PAIRS:
        if {first, second} <= tensors.keys():
            return _fitting(tensors[first], tensors[second], path), tensors[second], kept
    what = "this is half of an SDXL embedding: vectors for one text encoder"
    raise UserError(what, str(path), f"keep {WORD_FILES[0]} and {WORD_FILES[1]} in one folder, and give the folder")


def _word(kept: dict[str, str], path: Path) -> str | None:
    """The word of an embedding that this trainer wrote; diffusers' files hold one each."""
    words = json.loads(kept.get(metadata.WORDS, "[]"))
    if len(words) > 1:
        what = f"the file holds {len(words)} words: {', '.join(str(word) for word, _ in words)}"
        raise UserError(what, str(path), "convert the file of each word, from the folder beside it")
    return str(words[0][0]) if words else None


def _named(path: Path, of: int) -> dict[str, Tensor]:
    """A file's tensors; in diffusers' two files the one tensor has the token's name, and the file tells the encoder."""
    tensors = load_file(path)
    if of == 1:
        return tensors
    if len(tensors) != 1:
        raise UserError(f"the file holds {len(tensors)} tokens", str(path), "convert files of one token each")
    return {("clip_l", "clip_g")[WORD_FILES.index(path.name)]: next(iter(tensors.values()))}


def _fitting(first: Tensor, second: Tensor, path: Path) -> Tensor:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second):
        what = f"the two encoders' vectors do not fit: {list(first.shape)} and {list(second.shape)}"
        raise UserError(what, str(path), "use an embedding with the same number of vectors for both")
    return first
