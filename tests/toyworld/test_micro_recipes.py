"""The recipes of micro-SDXL's tokenizers and VAE."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

import toyworld as tw
from tests.recipes.loading import RECIPES, recipe

tokenizers, vae = recipe("make_tokenizers"), recipe("train_vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers")
    merges = tokenizers.learn_merges(tokenizers.word_counts(0, 1500))
    tokenizers.write_tokenizer(path / "tokenizer", merges, pad=tokenizers.END)
    tokenizers.write_tokenizer(path / "tokenizer_2", merges, pad="!")
    return path


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", None), ("tokenizer_2", 0)])
def test_a_caption_is_one_token_a_word_and_padded_as_sdxl_does(folder: Path, name: str, pad: int | None) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / name)
    end = len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (end - 1, end, 77)
    made = tw.scene(0, 3, count=1)
    words = tw.caption(made, 0, 3)
    ids = tokenizer(words.upper(), padding="max_length", truncation=True).input_ids
    count = len(words.replace(",", " ,").split())
    assert len(ids) == 77
    assert (ids[0], ids[count + 1]) == (end - 1, end)
    assert end not in ids[1 : count + 1]
    assert set(ids[count + 2 :]) == {end if pad is None else pad}
    for word in (*tw.BASE_SHAPES, *tw.COLOURS, *tw.TEXTURES, *tw.SIZES, "background", "corner", "picture"):
        assert len(tokenizer(word).input_ids) == 3, word


def test_any_text_survives_the_tokenizer(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = "an hourglass é 漢字 42"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_merges_are_learned_by_count_and_then_by_name() -> None:
    merges = tokenizers.learn_merges({"abc": 2, "bc": 1, "xy": 2})
    assert merges == [("b", "c</w>"), ("a", "bc</w>"), ("x", "y</w>")]


def tiny(steps: int = 3) -> dict[str, Any]:
    return {
        "seed": 0,
        "log_every": 1,
        "evaluate_every": 10,
        "checkpoint_every": 2,
        "model": {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 1},
        "loss": {"squared": 2.0, "kl": 2e-4},
        "optimizer": {"learning_rate": 1e-3, "warmup": 2, "decay_from": 2, "betas": [0.9, 0.99], "clip": 1.0},
        "phase": [{"steps": steps, "batch": 2, "crop": 32}, {"steps": 1, "batch": 2, "crop": 0}],
        "evaluation": {"seed": 7001, "pictures": 8, "final_pictures": 8, "centering_pictures": 8},
    }


def test_an_interrupted_vae_run_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    vae.train(tiny(), tmp_path / "straight")
    loss_of = vae.loss_of

    def interrupted(model: AutoencoderKL, config: dict[str, Any], step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return loss_of(model, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(vae, "loss_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vae.train(tiny(), tmp_path / "broken")
    vae.train(tiny(), tmp_path / "broken")

    straight, broken = (AutoencoderKL.from_pretrained(tmp_path / n / "final") for n in ("straight", "broken"))
    assert straight.config.scaling_factor == broken.config.scaling_factor != 0.18215
    for name, value in straight.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("straight", "broken")]
    rows = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert rows[0] == rows[1]
    assert not list(tmp_path.glob("*/*.part"))


def test_centering_gives_the_latents_unit_deviation_and_leaves_the_pictures_alone() -> None:
    config = tiny()
    model = vae.new_model(config)
    ((_, pictures), *_) = vae.evaluation_set(config, 16)
    x = vae.to_tensor(pictures)
    with torch.no_grad():
        before = model.decode(model.encode(x).latent_dist.mode()).sample
        noise = model.encode(x).latent_dist.std / model.encode(x).latent_dist.mean.std((0, 2, 3), keepdim=True)
        vae.center(model, config, 16)
        after = model.decode(model.encode(x).latent_dist.mode()).sample
        found = [model.encode(vae.to_tensor(p)).latent_dist.mean for _, p in vae.evaluation_set(config, 16)]
        posterior = model.encode(x).latent_dist
    flat = torch.cat([f.transpose(0, 1).flatten(1) for f in found], 1) * model.config.scaling_factor
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(flat.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(posterior.std / posterior.mean.std((0, 2, 3), keepdim=True), noise)


def test_batches_are_functions_of_the_step_and_windows_show_an_object() -> None:
    config = tiny(steps=20)
    for step in (0, 7, 20):
        assert torch.equal(vae.batch_of(config, step), vae.batch_of(config, step))
    assert not torch.equal(vae.batch_of(config, 0), vae.batch_of(config, 1))
    assert vae.batch_of(config, 0).shape == (2, 3, 32, 32)
    assert tuple(vae.batch_of(config, 20).shape[2:]) in vae.BUCKETS
    flat = [np.ptp(vae.window(0, index, 64), axis=(0, 1)).max() < 60 for index in range(100)]
    assert np.mean(flat) < 0.03


def test_the_shipped_configuration_is_complete() -> None:
    config = vae.tomllib.loads((RECIPES / "vae.toml").read_text())
    assert config.keys() == tiny().keys()
    for name in ("loss", "optimizer", "evaluation", "model"):
        assert config[name].keys() == tiny()[name].keys()
    steps = sum(phase["steps"] for phase in config["phase"])
    rates = [vae.learning_rate(config, step, steps) for step in range(steps)]
    assert max(rates) == config["optimizer"]["learning_rate"]
    assert rates[-1] < 1e-3 * max(rates)
