"""The recipe of micro-SDXL's UNet and text encoders: put together, trained, shipped, evaluated."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

import toyworld
from sdxl_trainer import text
from sdxl_trainer.blueprint import TextSize
from sdxl_trainer.configfile import load as load_config
from sdxl_trainer.demo import BASE
from sdxl_trainer.formats import folder
from sdxl_trainer.train import train
from tests.recipes.loading import RECIPES, recipe
from toyworld import score

SMALL = {
    "text_encoder": TextSize(16, layers=2, heads=1, intermediate=16, projection=16),
    "text_encoder_2": TextSize(24, layers=2, heads=1, intermediate=24, projection=24),
}
UNET = {
    "block_out_channels": [16, 16, 16],
    "attention_head_dim": [1, 1, 1],
    "norm_num_groups": 2,
    "addition_time_embed_dim": 8,
    "sample_size": 8,
}


make_base, train_text = recipe("make_base"), recipe("train_text")
data, ship, curves, edit = recipe("data"), recipe("ship"), recipe("curves"), recipe("edit")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts that come before: tokenizers, a VAE, a few pictures, and what is put together of them."""
    path = tmp_path_factory.mktemp("micro")
    tokenizers, vae = recipe("make_tokenizers"), recipe("train_vae")
    merges = tokenizers.learn_merges(tokenizers.word_counts(0, 300))
    tokenizers.write_tokenizer(path / "tokenizers" / "tokenizer", merges, pad=tokenizers.END)
    tokenizers.write_tokenizer(path / "tokenizers" / "tokenizer_2", merges, pad="!")
    model = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 1}
    vae.new_model({"seed": 0, "model": model}).save_pretrained(path / "vae")
    data.write(path / "data", squares=6, varied=3)
    described = make_base.described(SMALL, path / "tokenizers")
    short = {"seed": 0, "steps": 2, "batch": 4, "log_every": 1, "learning_rate": 1e-3, "warmup": 1, "width": 8}
    short |= {"evaluation_seed": 1, "evaluation_pairs": 4}
    for name, encoder in train_text.train(short, described, path / "tokenizers", path / "text.jsonl").items():
        make_base.write_part(path / "text", name, described[name], encoder)
    make_base.make(path / "untrained", path / "vae", path / "tokenizers", path / "text")
    return path


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    places = {"output_dir": "base", "model.path": "untrained", "cache.path": "cache"}
    places |= {"data.0.path": "data/squares", "data.1.path": "data/varied"}
    changes = [f"{option}={place / name}" for option, name in places.items()]
    changes += [f"model.unet.{name}={value}" for name, value in UNET.items()]
    changes += [f"train.{k}={v}" for k, v in {"steps": 2, "batch_size": 2, "checkpoint_every": 1}.items()]
    return train(load_config(RECIPES / "base.toml", changes))


def test_stock_diffusers_loads_the_base_and_its_scheduler_ends_in_pure_noise(place: Path, trained: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(trained, add_watermarker=False)
    sizes = {name: list(v) if isinstance(v, tuple) else v for name, v in pipeline.unet.config.items()}
    assert sizes | UNET == sizes
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.scheduler.set_timesteps(25)
    assert pipeline.scheduler.timesteps[0] == 999
    assert pipeline.scheduler.sigmas[0] > 1000
    given = AutoencoderKL.from_pretrained(place / "vae")
    assert all(torch.equal(v, given.state_dict()[n]) for n, v in pipeline.vae.state_dict().items())
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size


def test_captions_reach_the_unet_at_a_size_it_can_learn_from(trained: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(trained, add_watermarker=False)
    words = [caption for _, caption in toyworld.prompts(16, 5)]
    tokens, _, pooled, _ = pipeline.encode_prompt(words, do_classifier_free_guidance=False)
    for seen in (tokens.std(0).mean(), pooled.std(0).mean()):
        assert seen > 0.1


def test_the_same_arguments_make_the_same_base(place: Path, tmp_path: Path) -> None:
    make_base.make(tmp_path, place / "vae", place / "tokenizers", place / "text")
    for path in (p for p in (place / "untrained").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(place / "untrained")).read_bytes(), path


def test_the_text_encoders_learn_which_picture_a_caption_belongs_to(place: Path, tmp_path: Path) -> None:
    described = make_base.described(SMALL, place / "tokenizers")
    settings = {"seed": 0, "steps": 40, "batch": 32, "log_every": 40, "learning_rate": 3e-3, "warmup": 5, "width": 64}
    settings |= {"evaluation_seed": 1, "evaluation_pairs": 64}
    train_text.train(settings, described, place / "tokenizers", tmp_path / "log.jsonl")
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    for name in ("text_encoder", "text_encoder_2"):
        assert last[name]["loss"] < math.log(64) - 0.1  # guessing gives the logarithm


def test_what_stands_behind_a_caption_changes_nothing_before_it(place: Path) -> None:
    readers = tuple(CLIPTokenizer.from_pretrained(place / "tokenizers" / name) for name in folder.TOKENIZERS)
    tokens, pixels = train_text.batch_of(readers, 0, 0, 8)
    described = make_base.described(SMALL, place / "tokenizers")
    encoders = {name: make_base.random_encoder(name, described[name], 0) for name in text.PARTS}
    captions = [toyworld.caption(toyworld.scene(0, i, holdout=False), 0, i, terse=0.1) for i in range(8)]
    whole = torch.stack([r(captions, padding="max_length", return_tensors="pt").input_ids for r in readers], 1)
    assert torch.equal(whole[:, :, : tokens.shape[2]], tokens)
    pairs = train_text.Pairs(encoders, 8)
    for name, similarity in pairs(tokens, pixels).items():
        torch.testing.assert_close(similarity, pairs(whole, pixels)[name])


def test_no_training_picture_shows_a_held_out_combination() -> None:
    for seed in (data.SQUARES_SEED, data.VARIED_SEED):
        for index in range(500):
            scene = toyworld.scene(seed, index, holdout=False)
            assert not any(map(toyworld.held_out, scene.things))


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_shipped_in_fp16_with_its_averaged_weights(
    place: Path, trained: Path, tmp_path: Path, finished: bool
) -> None:
    run = trained
    if not finished:
        run = tmp_path / "run"
        run.mkdir()
        (run / "checkpoint-1").symlink_to(trained / "checkpoint-1")
    ship.ship(run, tmp_path / "ship")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "ship", dtype=torch.float32, add_watermarker=False)
    source = trained if finished else trained / "checkpoint-1"
    expected = ship.checkpoint.read_weights(source / ("unet" if finished else "unet_ema"))
    for name, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, expected[name].half().float()), name
    hashes = json.loads((tmp_path / "ship" / "hashes.json").read_text())
    assert {"unet/diffusion_pytorch_model.safetensors", "README.md", "model_index.json"} <= hashes.keys()
    assert f"{2 if finished else 1} steps" in (tmp_path / "ship" / "README.md").read_text()


def test_evaluation_tells_seen_from_held_out_and_draws_a_sheet(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, RECIPES / "evaluate.py", trained, "--prompts", "4", "--pairs", "2", "--steps", "1"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, check=True)
    assert "shape and colour" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["all"]["shape"]["total"] == 4
    assert result["held_out"]["place"]["total"] == result["seen"]["place"]["total"] == 2
    assert result["two_objects"]["relation"]["total"] == 2
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_edits_ask_for_another_colour_and_look_outside_of_the_mask(trained: Path, tmp_path: Path) -> None:
    found = edit.image_to_image(trained, 1, 0.05, tmp_path)
    assert found["right"].keys() >= {"colour", "place"}
    assert edit.inpainting(trained, 1, tmp_path)["outside"]["by_the_vae_alone"] > 0
    cells = np.zeros((4, 5), bool)
    cells[1, 1] = True
    assert edit._grown(cells).sum() == edit._grown(cells)[:3, :3].sum() == 9
    for index in range(50):
        scene = toyworld.scene(edit.SCENES_SEED, index, count=1)
        (before,), (after,) = scene.things, edit.recoloured(scene).things
        assert before.colour != after.colour != scene.background
        assert (before.shape, before.place) == (after.shape, after.place)
        assert np.asarray(edit.mask(scene)).mean() < 64


def test_the_reader_is_measured_on_drawings_and_on_what_the_vae_makes_of_them() -> None:
    found = recipe("world").measured(BASE, 8)
    assert found["pictures_per_cpu_second"] > 0
    for kind in ("drawn", "through_the_vae"):
        assert found[kind]["background"]["rate"] == 1.0
        assert found[kind]["shape"]["chance"] == score.CHANCE["shape"]


def test_curves_are_means_over_rows_that_have_both_values() -> None:
    rows = [{"step": 1, "a": {"b": 2}}, {"step": 2}, {"step": 3, "a": {"b": 4}}, {"step": 4, "a": {"b": 8}}]
    assert curves.series(rows, "step", "a.b", 2) == [(3.0, 3.0), (4.0, 8.0)]
    page = curves.draw({"a.b": [(0.0, 1.0), (9.0, 0.1)]}, "step", logarithmic=True)
    assert page.size == (curves.WIDTH, curves.HEIGHT)
    assert (36, 84, 206) in {colour for _, colour in page.getcolors(1 << 20)}
