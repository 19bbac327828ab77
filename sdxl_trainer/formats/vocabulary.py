"""The CLIP vocabulary: the real one, or a small one learned from captions in the same file format.

A CLIP vocabulary is a list of merges. Its ids are, in order: the 256 byte characters, the same 256 with the
end-of-word mark, one token per merge, and the two special tokens (openai/CLIP `simple_tokenizer.py`).
"""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_trainer import files
from sdxl_trainer.formats import folder

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Merge = tuple[str, str]

BOS, EOS, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_MERGES = folder.SHIPPED.parent / "clip_merges.txt.gz"


def byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes, in vocabulary order ('!' is token 0)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(visible)
    return [chr(code) for code in visible] + [chr(256 + index) for index in range(hidden)]


def clip_merges() -> list[Merge]:
    """The 48,894 merges of CLIP, which make its 49,408 tokens."""
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode("utf-8").splitlines()
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def token_ids(merges: Iterable[Merge]) -> dict[str, int]:
    """Token -> id, for a list of merges."""
    characters = byte_characters()
    tokens = [*characters, *(character + WORD_END for character in characters)]
    tokens += [left + right for left, right in merges]
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}


def learn_merges(captions: Iterable[str], limit: int) -> list[Merge]:
    """Byte-pair merges of the captions' words, the most frequent pair first, at most `limit` of them.

    Words are cut by the CLIP tokenizer itself, so that what is learned is what it will look up. Ties go to
    the pair that sorts first: the result depends on neither the order of the captions nor that of a hash table.
    """
    counts = Counter(word for caption in captions for word in _words(caption))
    words = [[*word[:-1], word[-1] + WORD_END] for word in sorted(counts)]
    weights = [counts[word] for word in sorted(counts)]
    totals: Counter[Merge] = Counter()
    holders: defaultdict[Merge, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            totals[pair] += weights[index]
            holders[pair].add(index)
    queue = [(-total, pair) for pair, total in totals.items()]
    heapify(queue)
    merges: list[Merge] = []
    while queue and len(merges) < limit:
        total, pair = heappop(queue)
        if totals[pair] != -total or not total:
            continue  # an outdated entry: the pair's count has changed, and its new count is in the queue too
        merges.append(pair)
        changed: set[Merge] = set()
        for index in sorted(holders.pop(pair)):
            old, new = words[index], _merged(words[index], pair)
            words[index] = new
            for sign, word in ((-1, old), (1, new)):
                for other in pairwise(word):
                    totals[other] += sign * weights[index]
                    changed.add(other)
                    if sign > 0:
                        holders[other].add(index)
        for other in sorted(changed):
            if totals[other]:
                heappush(queue, (-totals[other], other))
    return merges


def write(target: Path, merges: list[Merge], template: Path) -> None:
    """Write a tokenizer folder: the vocabulary, and the two configuration files of the folder `template`."""
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    files.write_bytes(target / "merges.txt", ("\n".join(lines) + "\n").encode("utf-8"))
    ids = json.dumps(token_ids(merges), ensure_ascii=False)
    files.write_bytes(target / "vocab.json", ids.encode("utf-8"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        files.write_bytes(target / name, (template / name).read_bytes())


def _merged(word: list[str], pair: Merge) -> list[str]:
    """The word with every occurrence of the pair replaced by its union."""
    result: list[str] = []
    index = 0
    while index < len(word):
        if tuple(word[index : index + 2]) == pair:
            result.append(word[index] + word[index + 1])
            index += 2
        else:
            result.append(word[index])
            index += 1
    return result


def _words(caption: str) -> list[str]:
    """The words of a caption in byte characters, as the CLIP tokenizer cuts them: '1 Cat!' -> 1, cat, !."""
    backend = _cutter().backend_tokenizer
    text = backend.normalizer.normalize_str(caption)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@cache
def _cutter() -> "CLIPTokenizer":
    """A CLIP tokenizer without merges."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=token_ids([]), merges=[])
