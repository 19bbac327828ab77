"""Text conditioning is that of the pipeline, and dropped captions are what the pipeline calls unconditional."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import base as bases
from sdxl_trainer import text
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Model, TextOptions

CUT = TextOptions(long_captions="cut")
PROMPTS = ["a red circle", "", "a blue square on a green circle " * 30, "A  RED circle!"]


@pytest.fixture(scope="module")
def encoders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> text.TextEncoders:
    found = bases.resolve(Model(path=str(base)), tmp_path_factory.mktemp("c"))
    return text.load(found, torch.float32, torch.device("cpu"))


def test_embeddings_are_those_of_the_pipeline(base: Path, encoders: text.TextEncoders) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    states, pooled = zip(*text.encode(encoders, [Prompt(p) for p in PROMPTS], CUT), strict=True)
    assert torch.equal(torch.stack(states), expected)
    assert torch.equal(torch.stack(pooled), expected_pooled)


def test_each_tokenizer_pads_with_its_own_token(encoders: text.TextEncoders) -> None:
    rows = [t("a", padding="max_length", max_length=77)["input_ids"] for t in encoders.tokenizers]
    eos = encoders.tokenizers[0].eos_token_id
    assert rows[0][-1] == eos
    assert rows[1][-1] == 0 != eos
    assert rows[0][:3] == rows[1][:3]


def test_overflows_count_the_tokens_that_are_cut(encoders: text.TextEncoders) -> None:
    prompts = [Prompt(p) for p in PROMPTS]
    ids = encoders.tokenizers[0](PROMPTS[2], truncation=False, verbose=False, add_special_tokens=False)["input_ids"]
    for options, kept in ((CUT, 75), (TextOptions(max_chunks=2, long_captions="kohya"), 150)):
        (cut,) = text.cuts(encoders.tokenizers, prompts, text.tokenize(encoders.tokenizers, prompts, options))
        assert cut.prompt == prompts[2]
        assert cut.tokens == len(ids) - kept > 0
        assert cut.text == encoders.tokenizers[0].decode(ids[kept:]).strip()


@pytest.mark.parametrize(
    ("choice", "force_zeros", "zeros"),
    [("pipeline", True, True), ("pipeline", False, False), ("empty", True, False), ("zeros", False, True)],
)
def test_dropped_captions(
    config: Callable[..., Any], base: Path, tmp_path: Path, choice: str, force_zeros: bool, zeros: bool
) -> None:
    import json
    import shutil

    from sdxl_trainer.data import prepare

    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": force_zeros}))
    made = config(model={"path": str(copy)}, text={"dropped_caption": choice})
    found = bases.resolve(made.model, tmp_path)
    stock = prepare.take_stock(made, found, "fp32")
    prepare.fill(made, found, stock, torch.device("cpu"), lambda *_: None, print)
    embeds, pooled = prepare.samples(made, found, stock, 1000).dropped.values()
    assert bool((embeds == 0).all() and (pooled == 0).all()) == zeros
    if not zeros:
        ((states, whole),) = text.encode(text.load(found, torch.float32, torch.device("cpu")), [Prompt("")], CUT)
        torch.testing.assert_close(embeds, states, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled, whole, rtol=1e-5, atol=1e-6)
