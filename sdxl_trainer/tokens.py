"""New words for the text encoders (textual inversion, Gal et al. 2022): rows beside frozen tables, as parameters of
their own. Nothing is put back after a step, since nothing else moves.

A word of several vectors is as many tokens, `<x>`, `<x>_1`, `<x>_2`, ..., as diffusers names them.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer import keyed, text
from sdxl_trainer.base import Base
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import TextOptions, Token
from sdxl_trainer.data.table import BATCH
from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.formats import WORD_FILES, header
from sdxl_trainer.formats import folder as pipelines
from sdxl_trainer.formats.metadata import WORDS
from sdxl_trainer.model import SDXL
from sdxl_trainer.text import Tokens

FOLDER = "embeddings"  # one file for each word, as ComfyUI and A1111 take them
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
# Prompts whose token ids are kept, where encoders work in the step.
REMEMBERED = 4096
_UNSAFE = re.compile(r'[<>:"/\\|?*\s]+')


class Extended(nn.Module):
    """A table of embeddings and rows that follow it; `new` holds a parameter [vectors, width] for each word."""

    def __init__(self, table: nn.Embedding, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.new = nn.ParameterDict()

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        old = self.table(ids.clamp(max=self.first - 1))
        if not self.new:
            return old
        new = nn.functional.embedding((ids - self.first).clamp(min=0), torch.cat(list(self.new.values())))
        return torch.where((ids >= self.first)[..., None], new.to(old.dtype), old)


def pieces(word: str, vectors: int) -> list[str]:
    """The tokens of a word."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def _bare(word: str) -> bool:
    """Whether letters beside it would make another word of it, as those of category do of cat."""
    return re.match(r"\w|.*\w$", word) is not None


def in_text(word: str) -> str:
    """A regular expression that finds a word in a text: in any case, since the encoders read none; not inside others,
    where brackets do not set it off."""
    return rf"(?i:(?<!\w){re.escape(word)}(?!\w))" if _bare(word) else f"(?i:{re.escape(word)})"


def names(word: Token) -> tuple[str, ...]:
    """How captions and prompts call a word."""
    return (word.name,) if word.placeholder is None else (word.placeholder, word.name)


def expand(words: Sequence[Token], caption: str) -> str:
    """A caption with every new word written as its tokens."""
    if not words:
        return caption
    longest = sorted(((name, word) for word in words for name in names(word)), key=lambda pair: -len(pair[0]))
    written = [" ".join(pieces(word.name, word.vectors)) for _, word in longest]
    either = "|".join(f"({in_text(name)})" for name, _ in longest)
    return re.sub(either, lambda found: written[(found.lastindex or 0) - 1], caption)


def expanded(words: Sequence[Token], prompt: Prompt) -> Prompt:
    """A prompt with every new word written as its tokens."""
    second = None if prompt.second is None else expand(words, prompt.second)
    return Prompt(expand(words, prompt.text), second, prompt.emphasis)


def tokenizers(base: Base, words: Sequence[Token]) -> tuple[Any, Any]:
    """The base's tokenizers, which know the new words."""
    both = text.tokenizers(base)
    for tokenizer in both:
        extend(tokenizer, [(word.name, word.vectors) for word in words], "token")
    return both


def chunks(
    tokenizers: tuple[Any, Any], words: Sequence[Token], options: TextOptions, prompts: Sequence[Prompt]
) -> list[Tokens]:
    """The chunks of each prompt, by tokenizers that know the new words in it."""
    return text.tokenize(tokenizers, [expanded(words, prompt) for prompt in prompts], options)


def reader(base: Base, words: Sequence[Token], options: TextOptions) -> Callable[[Prompt], Tokens]:
    """What gives a prompt's chunks, for one thread at a time; those of the last prompts are kept."""
    both, lock = tokenizers(base, words), threading.Lock()

    @lru_cache(maxsize=REMEMBERED)
    def read(prompt: Prompt) -> Tokens:
        with lock:
            return chunks(both, words, options, [prompt])[0]

    return read


def too_long(
    base: Base, words: Sequence[Token], options: TextOptions, prompts: Sequence[Prompt]
) -> tuple[int, list[text.Cut]]:
    """How many prompts are cut off, and the first of them."""
    count, first, both = 0, list[text.Cut](), tokenizers(base, words)
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        cut = text.cuts(both, batch, chunks(both, words, options, batch))
        count, first = count + len(cut), [*first, *cut][: text.SHOWN]
    return count, first


def extend(tokenizer: Any, words: Sequence[tuple[str, int]], where: str) -> int:
    """Add words to a tokenizer, which finds them as `expand` writes them; gives the id of the first new token. Words
    that it has already, in whatever case, are refused."""
    from tokenizers import AddedToken

    first, known = len(tokenizer), {token.lower() for token in tokenizer.get_vocab()}
    for word, vectors in words:
        for token in pieces(word, vectors):
            if {token.lower(), f"{token.lower()}</w>"} & known:
                what = f"'{token}' is already a token of the vocabulary"
                raise UserError(what, where, f"choose a word that is none yet, such as <{word.strip('<>')}-new>")
            tokenizer.add_tokens(AddedToken(token, single_word=_bare(word), normalized=False))
    return first


def refuse_unread(words: Sequence[Token], captions: Iterable[str]) -> None:
    """Refuse a word that no caption holds: it would learn nothing."""
    unread = dict(enumerate(words))
    patterns = [re.compile("|".join(map(in_text, names(word)))) for word in words]
    for caption in captions:
        unread = {index: word for index, word in unread.items() if not patterns[index].search(caption)}
        if not unread:
            return
    for index, word in unread.items():
        name = names(word)[0]
        fix = f"write {name} into the captions, for example caption = 'a photo of {name}' under [[data]]"
        apart = " as a word of its own" if _bare(name) else ""
        raise UserError(f"no caption holds the new word '{name}'{apart}", f"token.{index}.name", fix)


def inject(sdxl: SDXL, words: Sequence[Token], base: Base, seed: int) -> None:
    """Give both text encoders the new words, with rows as their options say, in fp32."""
    if not words:
        return
    for part, tokenizer in zip(KEYS, text.tokenizers(base), strict=True):
        encoder = sdxl.parts()[part]
        table = extended(encoder, len(tokenizer))
        find_end_by_id(encoder, tokenizer.eos_token_id)
        for index, word in enumerate(words):
            table.new[word.name] = nn.Parameter(_first_rows(table, tokenizer, words[:index], word, index, seed))
            extend(tokenizer, [(word.name, word.vectors)], f"token.{index}.name")
        mine = {id(p) for p in table.new.values()}
        sdxl.added.update(name for name, p in sdxl.named_parameters() if id(p) in mine)
    for index, word in enumerate(words):
        if word.start:
            _begin_with(sdxl, word, index)


def extended(encoder: nn.Module, first: int) -> Extended:
    """Put an extended table into an encoder."""
    for module in encoder.modules():
        table = getattr(module, "token_embedding", None)
        if isinstance(table, nn.Embedding):
            module.token_embedding = Extended(table, first)
            return module.token_embedding
    raise TypeError(f"{type(encoder).__name__} has no token_embedding")


def find_end_by_id(encoder: Any, end: int) -> None:
    """Pool at the end-of-text token. Older configs (eos_token_id = 2, SDXL's too) mean the token with the largest id,
    which a new one would be."""
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


@torch.no_grad()
def _first_rows(
    table: Extended, tokenizer: Any, earlier: Sequence[Token], word: Token, index: int, seed: int
) -> Tensor:
    """Rows [vectors, width]: those of the words of `init`, in turn, else drawn as wide as the table's own."""
    weight = table.weight.float()
    shape = (word.vectors, weight.shape[1])
    if weight.is_meta:
        return torch.empty(shape, device="meta")
    if word.init is None:
        draw = keyed.generator(seed, "token", index, weight.shape[1]).standard_normal(shape)
        return weight.mean(0) + weight.std(0) * torch.from_numpy(draw).float()
    ids = tokenizer(expand(earlier, word.init), add_special_tokens=False)["input_ids"]
    if not ids or len(ids) > word.vectors:
        what = f"'{word.init}' is {plural(len(ids), 'token')}, and '{word.name}' has {plural(word.vectors, 'vector')}"
        raise UserError(what, f"token.{index}.init", f"set vectors = {max(1, len(ids))} or more, or use other words")
    return table(torch.tensor(ids)).float()[[i % len(ids) for i in range(word.vectors)]].clone()


@torch.no_grad()
def _begin_with(sdxl: SDXL, word: Token, index: int) -> None:
    where = f"token.{index}.start"
    found = read(Path(str(word.start)).expanduser(), where)
    name = word.name if word.name in found else next(iter(found)) if len(found) == 1 else None
    if name is None:
        raise UserError(f"the file holds {shortened(found)}, not '{word.name}'", where, "name one of these words")
    for part, key in KEYS.items():
        rows, parameter = found[name][key], _tables(sdxl)[part].new[word.name]
        if rows.shape != parameter.shape:
            what = f"'{key}' of '{name}' is {list(rows.shape)}, and {list(parameter.shape)} is wanted"
            raise UserError(what, where, f"set vectors = {len(rows)}; widths of an SDXL embedding are 768 and 1280")
        parameter.copy_(rows)


def _tables(sdxl: SDXL) -> dict[str, Extended]:
    parts = {part: sdxl.parts().get(part) for part in KEYS}
    return {
        part: module for part, own in parts.items() if own for module in own.modules() if isinstance(module, Extended)
    }


def save(output: Path, sdxl: SDXL, values: Mapping[str, Tensor], facts: Mapping[str, str], suffix: str = "") -> None:
    """Write all words as one file, whose header tells whose rows are which, and one file for each word."""
    tables = _tables(sdxl)
    if not tables:
        return
    own: dict[str, dict[str, Tensor]] = {}
    for part, table in tables.items():
        for word in table.new:
            name = next(n for n in values if n.startswith(f"{part}.") and n.endswith(f"token_embedding.new.{word}"))
            own.setdefault(word, {})[KEYS[part]] = values[name].float()
    together = {key: torch.cat([rows[key] for rows in own.values()]) for key in KEYS.values()}
    said = {**facts, WORDS: json.dumps([[word, len(rows["clip_l"])] for word, rows in own.items()])}
    pipelines.write_tensors(output / WORD_FILES[0].replace(".safetensors", f"{suffix}.safetensors"), together, said)
    for word, rows in own.items():
        said = {**facts, WORDS: json.dumps([[word, len(rows["clip_l"])]])}
        pipelines.write_tensors(output / f"{FOLDER}{suffix}" / f"{file_name(word)}.safetensors", rows, said)


def file_name(word: str) -> str:
    """A word as a file's name, by which ComfyUI and A1111 call it: <x> is x."""
    return _UNSAFE.sub("", word) or "word"


def read(path: Path, where: str) -> dict[str, dict[str, Tensor]]:
    """Words and their rows by key, from a file or a run's folder; a file of others holds one, called as the file."""
    from safetensors import safe_open

    path = path / WORD_FILES[0] if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"there is no file '{path}'", where, f"give {WORD_FILES[0]} or the folder of a run that made one"
        )
    keys = set(header.read(path, "download or train the file again"))
    if not set(KEYS.values()) <= keys:
        what = f"this is no embedding for SDXL: it holds {shortened(sorted(keys), 3)}, not clip_l and clip_g"
        raise UserError(what, str(path), "use one made for SDXL; those for SD 1 and 2 do not fit")
    with safe_open(path, framework="pt") as opened:
        rows = {key: torch.atleast_2d(opened.get_tensor(key)) for key in KEYS.values()}
        told = (opened.metadata() or {}).get(WORDS)
    words: list[Any] = json.loads(told) if told else [[path.stem, len(rows["clip_l"])]]
    counts = [int(count) for _, count in words]
    if any(len(value) != sum(counts) for value in rows.values()):
        raise UserError("clip_l and clip_g do not have equally many rows", str(path), "train or download it again")
    split = {key: value.split(counts) for key, value in rows.items()}
    return {word: {key: split[key][i] for key in split} for i, (word, _) in enumerate(words)}


def attach(pipeline: Any, paths: Sequence[str]) -> list[Token]:
    """Teach a pipeline the words of embeddings' files, and give them."""
    words = list[Token]()
    for given in paths:
        found = read(Path(given).expanduser(), "--embedding")
        words += [Token.model_construct(name=word, vectors=len(rows["clip_l"])) for word, rows in found.items()]
        for part, key in KEYS.items():
            encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, part.replace("text_encoder", "tokenizer"))
            modules = [m for m in encoder.modules() if isinstance(m, Extended)]
            table = modules[0] if modules else extended(encoder, len(tokenizer))
            if table.weight.is_meta:
                what = "--offload sequential keeps no weights with the text encoders, beside which new words would lie"
                raise UserError(what, given, "use --offload model")
            find_end_by_id(encoder, tokenizer.eos_token_id)
            for word, rows in found.items():
                if rows[key].shape[1] != table.weight.shape[1]:
                    what = f"'{key}' is {rows[key].shape[1]} wide, and the encoder {table.weight.shape[1]}"
                    raise UserError(what, given, "use an embedding made for this base")
                extend(tokenizer, [(word, len(rows[key]))], "--embedding")
                # A file's name may be what no parameter can be called.
                table.new[str(len(table.new))] = nn.Parameter(rows[key].to(table.weight), requires_grad=False)
    return words
