"""CLIP's text encoders and tokenizers against the library's, bit by bit, and what is left to the library."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_trainer import base as bases
from sdxl_trainer import blueprint, clip, kernels, text
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Model, TextOptions
from sdxl_trainer.formats import folder

CPU = torch.device("cpu")
SPECIAL = ["<|endoftext|>", "<|EndOfText|>", "<|startoftext|>", "!", "</w>", "'ll", "é", "ß", "日", "🙂", "\n", "\t"]


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as the library has them."""
    monkeypatch.setattr(kernels, "onednn", lambda: False)


def sentences(count: int) -> list[str]:
    """Texts of whatever a tokenizer may stumble over."""
    draw = random.Random(0)
    pieces = [*SPECIAL, *"abcdexyzABC .,'<|>0123_-", " photo of ", "circle"]
    return ["", *("".join(draw.choices(pieces, k=draw.randint(1, 20))) for _ in range(count)), "long " * 100]


@pytest.mark.parametrize("part", folder.TOKENIZERS)
@pytest.mark.parametrize("made", ["micro", "tiny"])
def test_ids_are_those_of_the_library(base: Path, made: str, part: str) -> None:
    place = (folder.MICRO if made == "micro" else base) / part
    theirs, ours = CLIPTokenizer.from_pretrained(place), clip.tokenizer(place)
    assert ours is not None
    texts = sentences(300)
    ids = theirs(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert ours(texts)["input_ids"] == ids
    assert [ours.decode(found) for found in ids] == [theirs.decode(found) for found in ids]
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for token in (",</w>", "no token at all"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)


def test_embeddings_in_fp32_are_those_of_the_library_but_for_rounding(base: Path, tmp_path: Path) -> None:
    found = bases.resolve(Model(path=str(base)), tmp_path)
    prompts, rows = [Prompt(words) for words in sentences(6)], []
    for load, dtype in ((text.load, torch.float64), (text.load, torch.float32), (text.load_to_encode, torch.float32)):
        loaded = load(found, dtype, CPU)
        tokens = text.tokenize(loaded.tokenizers, prompts, TextOptions())
        rows.append(torch.cat([states for states, _ in text.encode_tokens(loaded, tokens, TextOptions(), 4)]))
    exact, theirs, ours = rows
    assert (ours - exact).norm() < 3 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"clip_skip": 1}, {"long_captions": "comfyui", "max_chunks": 2}], ids=str)
def test_embeddings_are_those_of_the_library_bit_by_bit(
    base: Path, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, plain_products: None
) -> None:
    found = bases.resolve(Model(path=str(base)), tmp_path)
    theirs, ours = text.load(found, dtype, CPU), text.load_to_encode(found, dtype, CPU)
    assert all(isinstance(encoder, clip.Encoder) for encoder in ours.encoders)
    assert not any(p.requires_grad for encoder in ours.encoders for p in encoder.parameters())  # type: ignore[union-attr]
    prompts, wanted = [Prompt(words) for words in sentences(6)], TextOptions(**options)
    pairs = []
    for loaded in (theirs, ours):
        tokens = text.tokenize(loaded.tokenizers, prompts, wanted)
        rows = text.encode_tokens(loaded, tokens, wanted, 4)
        pairs.append([*rows, text.cuts(loaded.tokenizers, prompts, tokens)])
    assert pairs[0].pop() == pairs[1].pop()
    for (states, pooled), (found_states, found_pooled) in zip(*pairs, strict=True):
        assert torch.equal(states, found_states)
        assert torch.equal(pooled, found_pooled)


def test_the_end_of_text_is_the_largest_id_where_an_old_config_says_two(tmp_path: Path, plain_products: None) -> None:
    tiny = blueprint.configs(blueprint.SIZES["tiny"])["text_encoder_2"]
    config = {**tiny, "eos_token_id": 2, "torch_dtype": "float32"}
    torch.manual_seed(0)
    theirs = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)).eval()
    theirs.save_pretrained(tmp_path / "text_encoder_2")
    ours = clip.model(tmp_path / "text_encoder_2", config, None, torch.float32, CPU)
    assert ours is not None
    ids = torch.tensor([[1, 2, 9, 4], [8, 3, 2, 2]])
    with torch.no_grad():
        assert torch.equal(ours(ids).first, theirs(ids)[0])


@pytest.mark.parametrize(("part", "kind"), [("text_encoder", CLIPTextModel), ("text_encoder_2", None)])
def test_full_size_has_the_library_s_names_and_shapes(part: str, kind: Any) -> None:
    config = blueprint.configs(blueprint.SIZES["sdxl"])[part]
    assert clip.fits(config)
    with torch.device("meta"):
        theirs = (kind or CLIPTextModelWithProjection)(CLIPTextConfig.from_dict(config))
        ours = clip.Encoder(config, kind is None)
    shapes = {name.removeprefix("text_model."): tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("text_encoder/config.json", {"something_new": 1}),
        ("text_encoder_2/config.json", {"layer_norm_eps": 1e-5, "quantization_config": {}}),
        ("tokenizer/tokenizer_config.json", {"something_new": 1}),
        ("tokenizer_2/special_tokens_map.json", {"pad_token": "a"}),
        ("tokenizer/added_tokens.json", {}),
    ],
)
def test_what_is_not_known_is_left_to_the_library(
    base: Path, tmp_path: Path, file: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))
    asked: list[Any] = []
    monkeypatch.setattr(text, "load", lambda *_: asked.append(_))
    text.load_to_encode(bases.resolve(Model(path=str(tmp_path / "base")), tmp_path), torch.float32, CPU)
    assert asked


def test_a_cache_is_filled_without_the_libraries(tree: Any, tmp_path: Path) -> None:
    """They take seconds to import, and so does PyTorch's compiler."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree(cache={"path": str(tmp_path / "cache")})))
    code = """if True:
        import json, sys
        from pathlib import Path
        import torch
        from sdxl_trainer import base as bases
        from sdxl_trainer.configfile import validated
        from sdxl_trainer.data import prepare
        config = validated(json.loads(Path(sys.argv[1]).read_text()), "test")
        base = bases.resolve(config.model, Path(sys.argv[1]).parent)
        stock = prepare.take_stock(config, base, "fp32")
        assert len(stock.missing_latents()) and len(stock.missing_texts())
        prepare.fill(config, base, stock, torch.device("cpu"), lambda *_: None, print)
        print(sorted({"diffusers", "transformers", "bitsandbytes", "torch._dynamo"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
