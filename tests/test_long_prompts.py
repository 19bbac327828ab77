"""Prompts of several chunks and with weights: what the encoders give, re-derived, and what the UNet makes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_trainer import base as bases
from sdxl_trainer import model, text
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Model, TextOptions

LONG = "a red circle, a blue square on a green circle, " * 12  # 144 tokens and more
WAYS = ["a1111", "comfyui", "kohya", "cut"]


@pytest.fixture(scope="module")
def encoders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> text.TextEncoders:
    found = bases.resolve(Model(path=str(base)), tmp_path_factory.mktemp("c"))
    return text.load(found, torch.float32, torch.device("cpu"))


def content(encoders: text.TextEncoders, words: str) -> list[int]:
    return encoders.tokenizers[0](words, add_special_tokens=False, verbose=False)["input_ids"]


@torch.no_grad()
def hidden(encoders: text.TextEncoders, encoder: int, ids: list[int], layer: int = -2) -> tuple[Tensor, Tensor]:
    """States [77, D] and pooled output of one chunk, from the token ids alone: begin, ids, end, padding."""
    tokenizer = encoders.tokenizers[encoder]
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    row += [[tokenizer.eos_token_id, 0][encoder]] * (77 - len(row))
    output = encoders.encoders[encoder](torch.tensor([row]), output_hidden_states=True)
    return output.hidden_states[layer][0], output[0][0]


def expected(encoders: text.TextEncoders, chunks: list[list[int]]) -> tuple[Tensor, Tensor]:
    both = [torch.cat([hidden(encoders, encoder, chunk)[0] for chunk in chunks]) for encoder in (0, 1)]
    return torch.cat(both, dim=-1), hidden(encoders, 1, chunks[0])[1]


def encoded(encoders: text.TextEncoders, prompt: str | Prompt, **options: Any) -> tuple[Tensor, Tensor]:
    prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
    return text.encode(encoders, [prompt], TextOptions(**options))[0]


def test_a_long_prompt_is_chunks_that_end_at_commas(encoders: text.TextEncoders) -> None:
    ids = content(encoders, LONG)
    comma = encoders.tokenizers[0].convert_tokens_to_ids(",</w>")
    chunks = []
    while ids:
        commas = [i for i, token in enumerate(ids[:75]) if token == comma]
        cut = commas[-1] + 1 if len(ids) > 75 else len(ids)
        chunks.append(ids[:cut])
        ids = ids[cut:]
    assert len(chunks) == 3
    assert len(chunks[0]) < 75
    states, pooled = encoded(encoders, LONG)
    assert states.shape[0] == 3 * 77
    for found, wanted in zip((states, pooled), expected(encoders, chunks), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_long_prompt_as_in_comfyui_is_full_chunks(encoders: text.TextEncoders) -> None:
    ids = content(encoders, LONG)
    chunks = [ids[i : i + 75] for i in range(0, len(ids), 75)]
    found = encoded(encoders, LONG, long_captions="comfyui")
    for one, other in zip(found, expected(encoders, chunks), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", ["a red circle", LONG, "red, " * 38 + "red", "red " * 75, "red " * 150, ""])
def test_kohya_has_one_begin_and_one_end(encoders: text.TextEncoders, words: str) -> None:
    """From its own arithmetic: pad to 152 with each tokenizer's padding, slice 75s, mend the ends, join."""
    ids = content(encoders, words)[:150]
    parts = []
    for encoder, tokenizer in enumerate(encoders.tokenizers):
        pad, end = [tokenizer.eos_token_id, 0][encoder], tokenizer.eos_token_id
        row = [tokenizer.bos_token_id, *ids, end]
        row += [pad] * (152 - len(row))
        sliced = []
        for k in (0, 1):
            chunk = [row[0], *row[1 + 75 * k : 76 + 75 * k], row[-1]]
            if chunk[-2] not in {end, pad}:
                chunk[-1] = end
            if chunk[1] == pad:
                chunk[1] = end
            sliced.append(chunk)
        with torch.no_grad():
            states = encoders.encoders[encoder](torch.tensor(sliced), output_hidden_states=True).hidden_states[-2]
        parts.append(torch.cat([states[0, :1], states[0, 1:76], states[1, 1:76], states[1, 76:]]))
    found, _ = encoded(encoders, words, long_captions="kohya", max_chunks=2)
    assert found.shape[0] == 152
    torch.testing.assert_close(found, torch.cat(parts, dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_token_100_counts_where_prompts_have_chunks_and_not_where_they_are_cut(
    encoders: text.TextEncoders, way: str
) -> None:
    words = ["red", "blue"] * 60
    other = words[:99] + ["green"] + words[100:]
    one, two = (encoded(encoders, " ".join(w), long_captions=way) for w in (words, other))
    assert torch.equal(one[0], two[0]) == (way == "cut")
    assert torch.equal(one[1], two[1])  # the pooled output is the first chunk's


def test_short_prompts_are_the_same_in_every_way_but_kohyas(encoders: text.TextEncoders) -> None:
    found = [encoded(encoders, "a red circle", long_captions=way) for way in ("a1111", "comfyui", "cut")]
    assert all(torch.equal(one, other) for pair in found[1:] for one, other in zip(found[0], pair, strict=True))


@pytest.mark.parametrize("emphasis", ["a1111", "a1111_no_norm", "comfyui"])
def test_weights(encoders: text.TextEncoders, emphasis: str) -> None:
    """The formulas on one chunk, in double precision; the pooled output has no weights."""
    ids = [content(encoders, words) for words in ("a", "red", "circle")]
    weights = torch.ones(77, 1, dtype=torch.float64)
    weights[1 + len(ids[0]) : 1 + len(ids[0]) + len(ids[1])] = 1.4
    parts = []
    for encoder in (0, 1):
        z = hidden(encoders, encoder, [i for word in ids for i in word])[0].double()
        nothing = hidden(encoders, encoder, [])[0].double()
        changed = nothing + weights * (z - nothing) if emphasis == "comfyui" else z * weights
        parts.append(changed * (z.mean() / changed.mean()) if emphasis == "a1111" else changed)
    found, pooled = encoded(encoders, Prompt("a (red:1.4) circle", emphasis=True), emphasis=emphasis)
    torch.testing.assert_close(found.double(), torch.cat(parts, dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, hidden(encoders, 1, [i for word in ids for i in word])[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("emphasis", ["a1111", "a1111_no_norm", "comfyui"])
def test_weights_of_one_and_prompts_beside_change_nothing(encoders: text.TextEncoders, emphasis: str) -> None:
    options = TextOptions(emphasis=emphasis)
    heavy, plain = Prompt("(red:1.5) [circle]", emphasis=True), Prompt("a blue square")
    together = text.encode(encoders, [heavy, plain, Prompt("(a blue square:1.0)", emphasis=True)], options)
    for found, prompt in zip(together, (heavy, plain, plain), strict=True):
        alone = text.encode(encoders, [prompt], options)[0]
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_brackets_are_text_without_emphasis(encoders: text.TextEncoders) -> None:
    ids = content(encoders, "a (red:1.5) circle")
    found, _ = encoded(encoders, "a (red:1.5) circle", emphasis="a1111")
    torch.testing.assert_close(found, expected(encoders, [ids])[0], rtol=1e-5, atol=1e-6)


def test_both_encoders_may_read_different_texts(encoders: text.TextEncoders) -> None:
    """The shorter one is filled up with empty chunks."""
    found, pooled = encoded(encoders, Prompt("a red circle", second="blue " * 80))
    first = torch.cat([hidden(encoders, 0, ids)[0] for ids in (content(encoders, "a red circle"), [])])
    blue = content(encoders, "blue " * 80)
    second = torch.cat([hidden(encoders, 1, ids)[0] for ids in (blue[:75], blue[75:])])
    torch.testing.assert_close(found, torch.cat([first, second], dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled, hidden(encoders, 1, blue[:75])[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [1, 2, 3, 4])
def test_clip_skip_counts_layers_of_both_encoders_and_leaves_the_pooled_output(skip: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=20, eos_token_id=19, bos_token_id=18, projection_dim=8, **sizes)
    torch.manual_seed(0)
    pair: Any = (CLIPTextModel(config).eval(), CLIPTextModelWithProjection(config).eval())
    ids = torch.tensor([[[18, 3, 4, 19] + [19] * 73, [18, 3, 4, 19] + [0] * 73]])
    found, pooled = text.embed(pair, ids, skip)
    for i, encoder in enumerate(pair):
        states = encoder(ids[:, i], output_hidden_states=True).hidden_states
        assert len(states) == 5
        assert torch.equal(found[i], states[5 - skip])
    assert torch.equal(pooled, text.embed(pair, ids, 2)[1])
    assert torch.equal(pooled, pair[1](ids[:, 1]).text_embeds)


def test_no_sample_depends_on_the_others_of_its_batch(base: Path, encoders: text.TextEncoders, tmp_path: Path) -> None:
    """The UNet's prediction for prompts of 1, 2, 3 and 5 chunks (filled up to 6), alone and together."""
    from sdxl_trainer.config import TextOptions
    from sdxl_trainer.data import cache
    from sdxl_trainer.data.encode import Keys
    from sdxl_trainer.data.words import Words

    found = bases.resolve(Model(path=str(base)), tmp_path)
    options = TextOptions(max_chunks=6)
    sdxl = model.load(Model(path=str(base)), found, None, torch.float32, False, False, options, encoders).eval()
    prompts = [Prompt("red " * words) for words in (3, 80, 200, 330)]
    read = dict(zip(prompts, text.tokenize(encoders.tokenizers, prompts, options), strict=True))
    assert [len(tokens.ids) for tokens in read.values()] == [1, 2, 3, 6]
    words = Words(Keys("", "", "", "", options), cache.Store(tmp_path), read.__getitem__, 32, options)
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, time_ids = torch.full((4,), 500), torch.full((4, 6), 64)
    with torch.no_grad():
        together = sdxl(noisy, timesteps, time_ids, **words.together([words.of(p) for p in prompts]))
        for i, prompt in enumerate(prompts):
            alone = sdxl(noisy[i : i + 1], timesteps[:1], time_ids[:1], **words.together([words.of(prompt)]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("emphasis", ["off", "a1111", "comfyui"])
def test_validation_and_sample_draw_long_and_weighted_prompts_alike(
    config: Callable[..., Any], tmp_path: Path, emphasis: str
) -> None:
    import numpy as np
    from PIL import Image

    from sdxl_trainer import sample
    from sdxl_trainer.sampling import order
    from sdxl_trainer.train import train

    prompt = "a (red:1.3) circle, " + "a blue square, " * 30
    validation = {"prompts": [prompt], "negative": "a [green] circle", "images": 1, "steps": 2, "seed": 3}
    output = train(config(validation=validation, text={"emphasis": emphasis}, train={"steps": 1}))
    settings = {"negative": "a [green] circle", "steps": 2, "guidance": 5.0, "height": 64, "width": 64, "seed": 3}
    settings |= sample.read_as(TextOptions(emphasis=emphasis))
    (path,) = sample.run(order.made(str(output), settings, [prompt]), tmp_path / "drawn")
    with Image.open(path) as drawn, Image.open(output / "samples/step-000001/0-0.png") as validated:
        assert np.abs(np.asarray(drawn, int) - np.asarray(validated, int)).max() <= 1
