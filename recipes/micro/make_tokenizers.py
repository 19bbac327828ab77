"""Make the two tokenizers of micro-SDXL: a byte-level BPE learned from the captions of the toy world.

    python recipes/micro/make_tokenizers.py OUT [--seed 0] [--captions 20000]

Writes `OUT/tokenizer` and `OUT/tokenizer_2` in the file format of CLIP (`vocab.json`, `merges.txt` and two JSON files
of settings). They differ in one thing, as SDXL's do: the first pads with its end token, the second with "!", id 0.
"""

import argparse
import collections
import itertools
import json
import re
from pathlib import Path

import toyworld

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77
WORD_END = "</w>"
Pair = tuple[str, str]


def byte_alphabet() -> list[str]:
    """CLIP's printable stand-ins of the 256 bytes, in its order: "!" first (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def word_counts(seed: int, captions: int) -> dict[str, int]:
    """How often each word and each mark occurs in the training captions of world `seed`."""
    counts: collections.Counter[str] = collections.Counter()
    for index in range(captions):
        scene = toyworld.scene(seed, index, holdout=False)
        counts.update(re.findall(r"[a-z]+|[^\sa-z]", toyworld.caption(scene, seed, index, terse=0.1).lower()))
    return dict(counts)


def learn_merges(counts: dict[str, int]) -> list[Pair]:
    """The merges that make every word one token, the most frequent pair first (Sennrich et al. 2016), ties by name."""
    words = {word: (*word[:-1], word[-1] + WORD_END) for word in counts}
    merges: list[Pair] = []
    while True:
        pairs: collections.Counter[Pair] = collections.Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: merged(pieces, best) for word, pieces in words.items()}


def merged(pieces: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """`pieces` with every occurrence of `pair` made one, from left to right."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def write_tokenizer(folder: Path, merges: list[Pair], pad: str) -> None:
    """The four files of a CLIP tokenizer; ids in CLIP's order: bytes, bytes that end a word, merges, begin, end."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *map("".join, merges), BEGIN, END]
    if len(set(tokens)) != len(tokens):
        raise ValueError("two merges make the same token")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    settings = {
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": POSITIONS,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the two tokenizers of micro-SDXL.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions", type=int, default=20_000)
    arguments = parser.parse_args()
    counts = word_counts(arguments.seed, arguments.captions)
    merges = learn_merges(counts)
    write_tokenizer(arguments.out / "tokenizer", merges, pad=END)
    write_tokenizer(arguments.out / "tokenizer_2", merges, pad="!")
    print(f"{len(counts)} words, {len(merges)} merges, {512 + len(merges) + 2} tokens")


if __name__ == "__main__":
    main()
