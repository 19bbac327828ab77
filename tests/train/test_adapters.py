"""Adapters: only they move, they resume bitwise, and diffusers draws with them what the live model draws."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.test_sample import pixels

VALIDATION = {"prompts": ["a red circle"], "images": 1, "steps": 3, "guidance": 4.0, "seed": 5}
TRAIN = {"steps": 3, "learning_rate": 1e-2}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def stock_picture(base: Path, output: Path) -> np.ndarray:
    """What diffusers alone draws with the base and the file."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(output)
    drawn = pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=4.0, height=64, width=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    return np.asarray(drawn).astype(int)


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4},
        {"rank": 4, "alpha": 1.0, "targets": "linear", "parts": ["unet", "text_encoder", "text_encoder_2"]},
        {"rank": 4, "alpha": 8.0, "targets": "all", "conv_rank": 2, "rslora": True, "init": "gaussian"},
        {"kind": "dora", "rank": 4, "alpha": 2.0, "targets": "all", "parts": ["unet", "text_encoder_2"]},
    ],
    ids=["attention", "linear, text, alpha", "all, rslora", "dora"],
)
def test_diffusers_draws_what_the_live_model_draws(
    config: Callable[..., Any], base: Path, adapter: dict[str, Any], tmp_path: Path
) -> None:
    output = train(config(adapter=adapter, train=TRAIN, validation=VALIDATION))
    drawn = pixels(output / "samples" / "step-000003" / "0-0.png")
    assert np.abs(drawn - stock_picture(base, output)).max() <= 1
    untrained = train(
        config(
            adapter=adapter,
            train={"steps": 1, "learning_rate": 1e-9},
            validation=VALIDATION,
            output_dir=str(tmp_path / "no"),
        )
    )
    assert np.abs(drawn - pixels(untrained / "samples" / "step-000001" / "0-0.png")).max() > 3
    assert losses(output)[0] == pytest.approx(losses(untrained)[0], rel=1e-5)


EVERYTHING = {
    "adapter": {"rank": 4, "targets": "linear", "dropout": 0.2, "parts": ["unet", "text_encoder_2"]},
    "ema": {"enabled": True},
    "data": [{"caption_dropout": 0.3, "flip": True}],
}
RESULTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_raw.safetensors")


def same(one: Path, two: Path) -> bool:
    first, second = load_file(one), load_file(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_exactly_these_files(config: Callable[..., Any]) -> None:
    output = train(config(**EVERYTHING))
    records = {"config.toml", "manifest.json", "metrics.jsonl", "report.html", "README.md"}
    assert {p.name for p in output.iterdir()} == {*RESULTS, *records, "checkpoint-2", "checkpoint-4"}
    kept = {"added.safetensors", "added_ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {p.name for p in (output / "checkpoint-4").iterdir()} == {*kept, RESULTS[0]}
    assert same(output / RESULTS[0], output / "checkpoint-4" / RESULTS[0])
    assert not same(output / RESULTS[0], output / RESULTS[1])
    names = set(load_file(output / RESULTS[0]))
    assert all(
        "lora" in name and name.startswith(("unet.", "text_encoder_2.text_model.", "text_encoder_2.text_proj"))
        for name in names
    )
    assert {tensor.dtype for tensor in load_file(output / RESULTS[0]).values()} == {torch.float32}


def test_resume_is_bitwise(config: Callable[..., Any], tmp_path: Path) -> None:
    whole = train(config(**EVERYTHING, output_dir=str(tmp_path / "whole")))
    train(config(**EVERYTHING, train={"steps": 2}))
    parted = train(config(**EVERYTHING))
    assert losses(parted) == losses(whole)
    assert all(same(whole / name, parted / name) for name in RESULTS)


def test_the_mask_of_a_sample_depends_on_neither_micro_batch_nor_checkpointing(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    """And there is a mask: without dropout the losses are others."""
    found = {}
    for name, dropout, options in (
        ("whole", 0.3, {}),
        ("micro", 0.3, {"micro_batch": 1}),
        ("recomputed", 0.3, {"gradient_checkpointing": True}),
        ("none", 0.0, {}),
    ):
        adapter = {**EVERYTHING["adapter"], "dropout": dropout}
        sizes = {"steps": 3, "batch_size": 3, "learning_rate": 1e-3, **options}
        found[name] = losses(train(config(adapter=adapter, train=sizes, output_dir=str(tmp_path / name))))
    assert found["micro"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["recomputed"] == pytest.approx(found["whole"], rel=1e-5)
    assert found["none"] != pytest.approx(found["whole"], rel=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_text_encoders_that_recompute_drop_the_same(
    config: Callable[..., Any], tmp_path: Path, micro_batch: int
) -> None:
    """Of captions of several chunks too, each of which has a mask of its own."""
    long = ", ".join(["a red circle", "a green square"] * 15)
    adapter = {"rank": 4, "dropout": 0.5, "parts": ["unet", "text_encoder", "text_encoder_2"]}
    found = {}
    for recompute in (False, True):
        sizes = {"steps": 2, "micro_batch": micro_batch, "gradient_checkpointing": recompute, "learning_rate": 1e-2}
        made = config(
            data=[{"caption": long, "caption_only": True}],
            adapter=adapter,
            train=sizes,
            output_dir=str(tmp_path / str(recompute)),
        )
        found[recompute] = load_file(train(made) / RESULTS[0])
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_only_what_the_rules_name_moves(config: Callable[..., Any]) -> None:
    """LoRA+ (Hayou et al. 2024) is a rule: B learns faster than A. Here A does not learn at all."""
    from sdxl_trainer import setup
    from sdxl_trainer.run import CONTINUE, Stop
    from sdxl_trainer.train import _loop

    rules = [{"match": r".*\.lora_B\..*", "learning_rate": 1e-2}, {"match": ".*", "learning_rate": 0.0}]
    job = setup.prepare_job(config(adapter={"rank": 4}, learn=rules), CONTINUE)
    assert job is not None
    before = {name: p.detach().clone() for name, p in job.run.sdxl.named_parameters()}
    _loop(job, Stop())
    job.metrics.close()
    moved = {n for n, p in job.run.sdxl.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if ".lora_B." in name}


def test_sample_draws_with_adapters_by_weight(
    config: Callable[..., Any],
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice half of an adapter is the adapter; weight 0 is the base."""
    from sdxl_trainer import sample
    from sdxl_trainer.sampling import models, order

    def unlearning(*given: Any) -> models.Loaded:
        """As with an adapter: by weights that could learn PyTorch multiplies in another way, with other last bits."""
        loaded = load(*given)
        for part in ("unet", "text_encoder", "text_encoder_2"):
            getattr(loaded.pipeline, part).requires_grad_(False)
        return loaded

    load = models.load
    monkeypatch.setattr(models, "load", unlearning)
    output = train(config(adapter={"rank": 2, "alpha": 3.0}, train=TRAIN, validation=VALIDATION))
    settings = {"steps": 3, "guidance": 4.0, "height": 64, "width": 64, "seed": 5}
    file = str(output / RESULTS[0])
    pictures = []
    for number, loras in enumerate(([str(output)], [f"{file}:0.5", f"{output}:0.5"], [f"{file}:0"], [])):
        folder = tmp_path / str(number)
        (path,) = sample.run(order.made(str(base), {**settings, "loras": tuple(loras)}, ["a red circle"]), folder)
        pictures.append(pixels(path))
    assert caplog.text == "", "diffusers says nothing of text encoders that the adapter is not for"
    live = pixels(output / "samples" / "step-000003" / "0-0.png")
    assert np.abs(pictures[0] - live).max() <= 1
    assert np.abs(pictures[1] - live).max() <= 1
    assert np.abs(pictures[2] - pictures[3]).max() == 0
    assert np.abs(pictures[0] - pictures[3]).max() > 3


KINDS = {
    "loha": {"rank": 2, "alpha": 3.0, "targets": "all"},
    "lokr": {"rank": 2, "alpha": 1.0, "targets": "all", "parts": ["unet", "text_encoder"]},
    "lokr, whole": {"rank": 10_000, "factor": 2, "targets": "all", "conv_rank": 2, "parts": ["unet", "text_encoder"]},
    "oft": {"block_size": 8, "targets": "attention", "parts": ["unet", "text_encoder"]},
    "boft": {"block_size": 4, "targets": r"unet\..*attn[12]\.to_(v|out\.0)"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_peft_draws_with_the_other_kinds_what_the_live_model_draws(
    config: Callable[..., Any], base: Path, kind: str, tmp_path: Path
) -> None:
    """They are the base at first, resume bitwise, and are read back by peft alone and by `sdxl sample`."""
    from diffusers import StableDiffusionXLPipeline
    from peft import PeftModel

    from sdxl_trainer import sample
    from sdxl_trainer.sampling import order

    adapter = {"kind": kind.partition(",")[0], **KINDS[kind]}
    output = train(config(adapter=adapter, train=TRAIN, validation={**VALIDATION, "at_start": True}))
    drawn, start = (pixels(output / "samples" / f"step-{step:06}" / "0-0.png") for step in (3, 0))
    settings = {"steps": 3, "guidance": 4.0, "height": 64, "width": 64, "seed": 5}
    for loras, expected in (([str(output)], drawn), ([], start)):
        wanted = order.made(str(base), {**settings, "loras": tuple(loras)}, ["a red circle"])
        (path,) = sample.run(wanted, tmp_path / f"{loras}")
        assert np.abs(pixels(path) - expected).max() <= 1
    assert np.abs(drawn - start).max() > 3
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    for part in adapter.get("parts", ["unet"]):
        wrapped = PeftModel.from_pretrained(getattr(pipeline, part), output / f"{part}_adapter")
        setattr(pipeline, part, wrapped.base_model.model)
    by_peft = pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=4.0, height=64, width=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert np.abs(drawn - np.asarray(by_peft).astype(int)).max() <= 1
    parted = {"adapter": adapter, "output_dir": str(tmp_path / "parted")}
    train(config(**parted, train={**TRAIN, "steps": 2}))
    again = train(config(**parted, train=TRAIN))
    assert losses(again) == losses(output)
    for folder in output.glob("*_adapter"):
        name = f"{folder.name}/adapter_model.safetensors"
        assert same(output / name, again / name)


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4, "alpha": 2.0, "parts": ["unet", "text_encoder", "text_encoder_2"]},
        {"kind": "dora", "rank": 4, "parts": ["text_encoder_2"]},
        {"kind": "loha", "rank": 2, "alpha": 1.0},
        {"kind": "lokr", "rank": 2, "alpha": 1.0, "factor": 4, "targets": "all"},
        {"kind": "lokr", "rank": 10_000, "factor": 4, "parts": ["unet", "text_encoder_2"]},
    ],
    ids=["lora", "dora", "loha", "lokr", "lokr, whole"],
)
def test_an_adapter_begins_where_an_older_one_ended(
    config: Callable[..., Any], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    export = {"formats": ["kohya"], "name": "theirs"}
    first = train(config(adapter=adapter, train=TRAIN, output_dir=str(tmp_path / "first"), export=export))
    for start in (first, first / "theirs.safetensors"):
        next_one = {**adapter, "start": str(start)}
        output = str(tmp_path / f"after {start.name}")
        second = train(config(adapter=next_one, train={"steps": 1, "learning_rate": 1e-12}, output_dir=output))
        for path in [*first.glob("pytorch_lora*"), *first.glob("*_adapter/*.safetensors")]:
            old, new = load_file(path), load_file(second / path.relative_to(first))
            assert old.keys() == new.keys()
            assert all(torch.allclose(new[name], old[name], atol=1e-9) for name in old)
            moved = [t for name, t in new.items() if any(m in name for m in ("lora_B", "hada_w1", "lokr_w2"))]
            assert any(tensor.abs().max() > 1e-3 for tensor in moved)


def test_an_older_lokr_with_another_factor_or_scale_is_refused(config: Callable[..., Any], tmp_path: Path) -> None:
    from sdxl_trainer.errors import UserError

    lokr = {"kind": "lokr", "rank": 2, "alpha": 1.0, "factor": 4}
    first = train(config(adapter=lokr, train={"steps": 1}, output_dir=str(tmp_path / "first")))
    start = {**lokr, "start": str(first)}
    with pytest.raises(UserError, match=r"in the file, and .* by the config") as refused:
        train(config(adapter={**start, "factor": 2}))
    assert "factor" in refused.value.fix
    with pytest.raises(UserError, match=r"alpha 1; the config has alpha / rank, 2"):
        train(config(adapter={**start, "alpha": 2.0}))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_no_layer_is_ever_left_out(config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """peft compares a draw with the share of layers to leave out, which is 0, and so may the draw be."""
    from sdxl_trainer import adapters, setup
    from sdxl_trainer.run import CONTINUE

    job = setup.prepare_job(config(adapter={"kind": kind, "rank": 2}), CONTINUE)
    assert job is not None
    job.metrics.close()
    job.validation.close()
    layer = adapters.layers(job.run.sdxl.unet)[0]
    for name, parameter in layer.named_parameters():
        if "base_layer" not in name:
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, layer.in_features)
    expected = layer.eval()(x)
    monkeypatch.setattr(torch, "rand", lambda *sizes, **_: torch.zeros(*sizes))
    assert torch.equal(layer.train()(x), expected)
    assert not torch.equal(layer.base_layer(x), expected)


def test_options_of_lokr_without_effect_are_refused(config: Callable[..., Any]) -> None:
    from sdxl_trainer.errors import UserError

    with pytest.raises(UserError, match="alpha has no effect: with rank 10000 the second factor of every layer"):
        train(config(adapter={"kind": "lokr", "rank": 10_000, "alpha": 1.0}))
    with pytest.raises(UserError, match=r"adapter.factor = 4 has no effect: it is of kind 'lokr'"):
        config(adapter={"kind": "loha", "factor": 4})


def test_kohya_files_are_begun_with_by_their_alpha(config: Callable[..., Any], tmp_path: Path) -> None:
    """And an alpha other than the config's is refused: the same tensors would be another update."""
    from safetensors.torch import save_file

    from sdxl_trainer.errors import UserError

    targets = r"(unet|text_encoder_2)\..*(to_q|to_out\.0|ff\.net\.2|q_proj|out_proj)"
    adapter = {"rank": 4, "alpha": 2.0, "targets": targets, "parts": ["unet", "text_encoder_2"]}
    first = train(config(adapter=adapter, train=TRAIN, output_dir=str(tmp_path / "first")))
    mine, kohya = load_file(first / RESULTS[0]), {}
    for name, tensor in mine.items():
        layer, _, kind = name.rpartition(".lora_")
        stem = "lora_" + layer.replace("text_encoder_2", "te2").replace(".", "_")
        kohya[f"{stem}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = tensor
        kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    start = {**adapter, "start": str(tmp_path / "kohya.safetensors")}
    output = train(config(adapter=start, train={"steps": 1, "learning_rate": 1e-12}))
    new = load_file(output / RESULTS[0])
    assert new.keys() == mine.keys()
    assert all(torch.allclose(new[name], mine[name], atol=1e-9) for name in mine)
    with pytest.raises(UserError, match=r"alpha 2; the config has alpha / rank, 4"):
        train(config(adapter={**start, "alpha": 4.0}, output_dir=str(tmp_path / "other")))


def test_why_oft_is_for_linear_layers() -> None:
    """peft's OFT on a convolution of 3 x 3 is no identity at first, BOFT's is. Once it is, it need not be refused."""
    from peft import BOFTConfig, OFTConfig, inject_adapter_in_model

    options = {"target_modules": ["0"]}
    oft = OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, **options)
    boft = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, **options)
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    for config, same in ((oft, False), (boft, True)):
        network = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3, padding=1))
        before = network(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, network)
        assert torch.allclose(network(x), before, atol=1e-5) == same
