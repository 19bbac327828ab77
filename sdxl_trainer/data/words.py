"""The text of a batch: embeddings from the cache, or chunks of token ids for encoders that work in the step.

A prompt of n chunks has n * 77 positions. Prompts of different numbers share a batch by repetition, as in ComfyUI: each
one's sequence is repeated up to the least common multiple. Repeating keys and values as a whole leaves attention as
it is, softmax(q [k k]) [v v] = softmax(q k) v, so that no sample depends on its companions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm

import torch
from torch import Tensor

from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import TextOptions
from sdxl_trainer.data import cache
from sdxl_trainer.data.encode import Keys
from sdxl_trainer.data.places import Places
from sdxl_trainer.text import Tokens, factors

# Of one sample: prompt_embeds [n * 77, 768 + 1280] and pooled [1280]; or tokens [n, 2, 77], weights alike and kept [2],
# which is 0 where an encoder's output is to be zeros.
Text = dict[str, Tensor]
# Of a prompt in the cache.
ROWS = ("prompt_embeds", "pooled")


@dataclass(frozen=True)
class Words:
    """Where the text of a prompt is: `tokens` gives its ids where encoders work in the step, else the store has its
    embeddings. `width` is how many of the embeddings' columns are the first encoder's."""

    keys: Keys
    store: cache.Store
    tokens: Callable[[Prompt], Tokens] | None
    width: int
    options: TextOptions

    def of(self, prompt: Prompt) -> Text:
        """What the model takes for a prompt."""
        if self.tokens is not None:
            found = self.tokens(prompt)
            return {"tokens": found.ids.long(), "weights": factors(found), "kept": torch.ones(2)}
        return {name: cache.stacked([place])[0] for name, place in zip(ROWS, self._places.of([prompt])[0], strict=True)}

    @cached_property
    def _places(self) -> Places[Prompt]:
        return Places(self.store, self.keys.texts)

    def length(self, text: Prompt | Text) -> int:
        """Positions of a sample's text before it is repeated."""
        text = self.of(text) if isinstance(text, Prompt) else text
        if self.tokens is None:
            return len(text["prompt_embeds"])
        chunks, room = text["tokens"].shape[0], text["tokens"].shape[-1]
        return chunks * (room - 2) + 2 if self.options.long_captions == "kohya" else chunks * room

    def without(self, text: Prompt | Text, encoder: int, dropped: Text) -> Text:
        """The text with one encoder's part, 0 or 1, replaced by that of a caption that is left out."""
        text = self.of(text) if isinstance(text, Prompt) else text
        changed = {name: tensor.clone() for name, tensor in text.items()}
        if self.tokens is not None:
            changed["tokens"][:, encoder] = dropped["tokens"][:1, encoder]
            changed["weights"][:, encoder] = 1.0
            changed["kept"][encoder] = dropped["kept"][encoder]
            return changed
        columns = slice(None, self.width) if encoder == 0 else slice(self.width, None)
        nothing = dropped["prompt_embeds"]
        changed["prompt_embeds"][:, columns] = nothing.repeat(len(changed["prompt_embeds"]) // len(nothing), 1)[
            :, columns
        ]
        return changed | ({"pooled": dropped["pooled"]} if encoder == 1 else {})

    def together(self, said: Sequence[Prompt | Text]) -> Text:
        """The text of a batch: prompt_embeds [B, L, 2048] and pooled [B, 1280]; or C chunks of `tokens` [C, 2, 77],
        `chunks` [B, N] telling which of them make each sample's sequence, and kept [B, 2]. With `weights` [C, 2, 77]
        the first chunk is the empty one."""
        if self.tokens is None:
            places = iter(self._places.of([one for one in said if isinstance(one, Prompt)]))
            rows = [next(places) if isinstance(one, Prompt) else [one[name] for name in ROWS] for one in said]
            return {name: _stacked(column) for name, column in zip(ROWS, zip(*rows, strict=True), strict=True)}
        texts = [self.of(one) if isinstance(one, Prompt) else one for one in said]
        counts = [len(text["tokens"]) for text in texts]
        tokens, weights = (torch.cat([text[name] for text in texts]) for name in ("tokens", "weights"))
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
        length = lcm(*counts)
        parts = [torch.arange(n).repeat(length // n) + start for n, start in zip(counts, starts, strict=True)]
        batch = {"tokens": tokens, "chunks": torch.stack(parts), "kept": torch.stack([text["kept"] for text in texts])}
        if bool((weights == 1).all()):
            return batch
        empty = self.tokens(Prompt("")).ids[:1].long()
        return batch | {
            "tokens": torch.cat([empty, tokens]),
            "weights": torch.cat([torch.ones(empty.shape), weights]),
            "chunks": batch["chunks"] + 1,
        }


def _stacked(rows: Sequence[cache.Place | Tensor]) -> Tensor:
    """Rows of the store and others like them: [B, L, ...], each put where it stays and repeated there."""
    places = [row for row in rows if isinstance(row, cache.Place)]
    if len(places) == len(rows) and len({place.shape for place in places}) == 1:
        return cache.stacked(places)
    whole = torch.empty(len(rows), lcm(*(one.shape[0] for one in rows)), *rows[0].shape[1:], dtype=rows[0].dtype)
    first = [row[: one.shape[0]] for one, row in zip(rows, whole, strict=True)]
    pairs = list(zip(rows, first, strict=True))
    cache.read([(one, cache.buffer_of(row)) for one, row in pairs if isinstance(one, cache.Place)])
    for (one, row), repeated in zip(pairs, whole, strict=True):
        if isinstance(one, Tensor):
            row.copy_(one)
        for other in repeated.split(len(row))[1:]:
            other.copy_(row)
    return whole
