"""Blueprint pipelines: loadable by stock diffusers, deterministic, of the announced sizes, with CLIP's tokens."""

import hashlib
import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sdxl_trainer.blueprint import MERGES_LIMIT, SIZES, build, configs
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import folder, modules, vocabulary

CAPTIONS = ["a small red circle on a blue background", "Two green squares, left of a yellow triangle!"]
BOS, EOS = 49406, 49407

# NumPy 2 warns when diffusers' Euler scheduler turns a tensor into an array; diffusers has to change that call.
ARRAY_WARNING = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), "tiny", captions=CAPTIONS)


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def count(component: str, size: str) -> tuple[int, int]:
    """Parameters and tensors of a component, without memory."""
    with torch.device("meta"):
        module = modules.construct(component, configs(SIZES[size])[component])
    return sum(parameter.numel() for parameter in module.parameters()), len(module.state_dict())


@pytest.mark.parametrize(
    ("component", "size", "parameters", "tensors"),
    [
        ("unet", "sdxl", 2_567_463_684, 1680),
        ("vae", "sdxl", 83_653_863, 248),
        ("text_encoder", "sdxl", 123_060_480, 196),
        ("text_encoder_2", "sdxl", 694_659_840, 517),
        ("unet", "mid", 106_694_404, 1680),
    ],
)
def test_parameter_counts(component: str, size: str, parameters: int, tensors: int) -> None:
    assert count(component, size) == (parameters, tensors)


def test_tiny_is_tiny() -> None:
    assert 1e6 < count("unet", "tiny")[0] < 2.5e6


def test_the_real_size_is_what_was_published() -> None:
    """Replacing every size by SDXL's own changes nothing, and the files have their published SHA-256."""
    for component, config in configs(SIZES["sdxl"]).items():
        assert config == folder.read_config(component)
    published = {"unet/config.json": "30ebc7075022", "text_encoder/config.json": "39b8b2e4b194"}
    published["model_index.json"] = "a40ca00944bb"
    for name, digest in published.items():
        assert hashlib.sha256((folder.SHIPPED / name).read_bytes()).hexdigest().startswith(digest)


@ARRAY_WARNING
@pytest.mark.parametrize("captions", [CAPTIONS, None])
def test_stock_pipeline_draws(tmp_path: Path, captions: list[str] | None) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(build(tmp_path, "tiny", captions=captions))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    for encoder, tokenizer in (
        (pipeline.text_encoder, pipeline.tokenizer),
        (pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        assert encoder.config.vocab_size == len(tokenizer)
        assert encoder.dtype == torch.float32
    images = pipeline("a red circle", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    other = pipeline("two green squares", num_inference_steps=2, output_type="pt").images
    assert not torch.equal(images, other)


def test_autoencoder_is_finite(tiny: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny / "vae")
    with torch.no_grad():
        latent = vae.encode(torch.rand(1, 3, 64, 48) * 2 - 1).latent_dist
        picture = vae.decode(latent.mean).sample
    assert latent.mean.shape == latent.std.shape == (1, 4, 8, 6)
    assert latent.mean.isfinite().all()
    assert latent.std.isfinite().all()
    assert picture.isfinite().all()


def test_same_seed_same_files(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = build(tmp_path / "again", "tiny", captions=reversed(CAPTIONS))
    assert torch.equal(torch.rand(1), expected), "building must leave the global generator alone"
    assert digests(again) == digests(tiny)
    other = digests(build(tmp_path / "other", "tiny", captions=CAPTIONS, seed=1))
    changed = {name for name, digest in digests(tiny).items() if other[name] != digest}
    assert changed == {f"{component}/{name}" for component, name in folder.WEIGHTS.items()}


def test_components_and_neighbouring_seeds_share_no_numbers(tiny: Path, tmp_path: Path) -> None:
    build(tmp_path, "tiny", captions=CAPTIONS, seed=1)
    name = "text_model.embeddings.position_embedding.weight"
    starts = [
        tuple(folder.read_weights(component, root)[name].flatten()[:50].tolist())
        for root in (tiny, tmp_path)
        for component in ("text_encoder", "text_encoder_2")
    ]
    assert len(set(starts)) == 4


def test_other_dtype_and_size(tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    size = replace(SIZES["tiny"], unet=replace(SIZES["tiny"].unet, layers=2))
    build(tmp_path, size, captions=CAPTIONS, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    for component in folder.WEIGHTS:
        assert {tensor.dtype for tensor in folder.read_weights(component, tmp_path).values()} == {torch.bfloat16}
    assert CLIPTextModel.from_pretrained(tmp_path / "text_encoder").dtype == torch.bfloat16
    assert "down_blocks.0.resnets.1.conv1.weight" in folder.read_weights("unet", tmp_path)


def test_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tiny"):
        build(tmp_path, "tinny")
    assert not list(tmp_path.iterdir())


def test_index_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that was not finished must not look like one."""
    build(tmp_path, "tiny", captions=CAPTIONS)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(folder, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path, "tiny", captions=CAPTIONS)
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo of a CAT", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        ("", []),
    ],
)
def test_clip_tokens(tmp_path: Path, text: str, ids: list[int]) -> None:
    """Known ids of CLIP (openai/CLIP `tokenize`). The second tokenizer of SDXL pads with '!', which is token 0."""
    from transformers import CLIPTokenizer

    expected = {"tokenizer": (ids, EOS), "tokenizer_2": ([0 if token == 256 else token for token in ids], 0)}
    for name, (inner, pad) in expected.items():
        vocabulary.write(tmp_path / name, vocabulary.clip_merges(), folder.SHIPPED / name)
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / name)
        assert len(tokenizer) == 49408
        assert tokenizer(text).input_ids == [BOS, *inner, EOS]
        padded = tokenizer(text, padding="max_length", max_length=77).input_ids
        assert padded == [BOS, *inner, EOS] + [pad] * (75 - len(inner))
        assert tokenizer.model_max_length == 77


def test_learned_vocabulary_knows_its_captions(tiny: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    words = "two green squares , left of a yellow triangle".split()
    ids = tokenizer(CAPTIONS[1].rstrip("!")).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [word + "</w>" for word in words]
    assert tokenizer.decode(tokenizer("zebra 🦓 naïve").input_ids, skip_special_tokens=True) == "zebra 🦓 naïve"
    assert tokenizer.unk_token_id not in tokenizer("zebra 🦓 naïve").input_ids[1:-1]
    config = json.loads((tiny / "text_encoder_2" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def naive_merges(counts: dict[str, int], limit: int) -> list[tuple[str, str]]:
    """Byte-pair encoding by its definition: count all pairs, merge the most frequent, count again."""
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        totals: dict[tuple[str, str], int] = {}
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                totals[pair] = totals.get(pair, 0) + counts[word]
        if not totals:
            break
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        merges.append(best)
        for symbols in words.values():
            index = 0
            while index + 1 < len(symbols):
                if (symbols[index], symbols[index + 1]) == best:
                    symbols[index : index + 2] = ["".join(best)]
                index += 1
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_learned_merges_follow_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    words = ["".join(draw.choices("ab", k=draw.randint(1, 7))) for _ in range(30)]
    counts = {word: words.count(word) for word in words}
    for limit in (10, MERGES_LIMIT):
        assert vocabulary.learn_merges([" ".join(words)], limit) == naive_merges(counts, limit)


def test_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vae"):
        folder.read_config("vae", tmp_path)
    with pytest.raises(UserError, match="text_encoder_2"):
        folder.read_weights("text_encoder_2", tmp_path)
