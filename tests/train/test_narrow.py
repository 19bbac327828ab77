"""Frozen weights in fewer bits: what is kept, what it costs in accuracy, and that the gradients are those of it."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdxl_trainer import adapters, model, narrow
from sdxl_trainer import base as bases
from sdxl_trainer.config import Adapter, Model
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train

# Mean error of a weight, relative to the mean weight, for normally distributed ones: half a step of each type.
ERRORS = {"bf16": 0.002, "fp16": 0.0003, "fp8": 0.03, "int8": 0.015, "nf4": 0.1}
NARROW = [name for name in ERRORS if name not in {"bf16", "fp16"}]


def loaded(base: Path, folder: Path) -> model.SDXL:
    options = Model(path=str(base))
    return model.load(options, bases.resolve(options, folder), None, torch.float32, False, False)


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_weights(kind: str) -> None:
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = narrow.PACKINGS[kind](weight)
    error = (packed.unpack(packed.tensors).float() - weight).abs().mean() / weight.abs().mean()
    assert 0 < error.item() < ERRORS[kind]
    size = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert size / weight.numel() < narrow.BYTES[kind] * 1.1
    if kind == "fp8":  # without a scale, as elsewhere, small weights lose their digits
        assert (weight.to(torch.float8_e4m3fn).float() - weight).abs().mean() / weight.abs().mean() > error


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_unpacked_weights(
    base: Path, tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    """An ordinary model with the same rounded weights gives the same output and the same gradients, bit by bit."""
    packed, plain = loaded(base, tmp_path), loaded(base, tmp_path)
    narrow.pack(packed, kind, torch.float32)
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight = nn.Parameter(packed.get_submodule(name).weight.detach().clone())
    outputs, gradients = [], []
    for sdxl in (packed, plain):
        adapters.inject(sdxl, Adapter(kind="dora", rank=2, targets="all"), 0)
        if checkpointing:
            sdxl.unet.enable_gradient_checkpointing()
        sdxl.train()
        for name, parameter in sdxl.named_parameters():
            parameter.requires_grad_(name in sdxl.added)
            if ".lora_B." in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        draw = torch.Generator().manual_seed(2)
        shapes = {"prompt_embeds": (1, 77, 64), "pooled": (1, 40)}
        text = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        noisy = torch.randn(1, 4, 8, 8, generator=draw)
        output = sdxl(noisy, torch.tensor([500]), torch.tensor([[64, 64, 0, 0, 64, 64]]), **text)
        output.square().mean().backward()
        outputs.append(output.detach())
        gradients.append({name: sdxl.get_parameter(name).grad for name in sdxl.added})
    assert torch.equal(*outputs)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_unpacked_weights_are_not_kept_for_the_backward_pass(base: Path, tmp_path: Path) -> None:
    sdxl = loaded(base, tmp_path)
    narrow.pack(sdxl, "int8", torch.float32)
    adapters.inject(sdxl, Adapter(rank=2), 0)
    for name, parameter in sdxl.named_parameters():
        parameter.requires_grad_(name in sdxl.added)
    layer: Any = sdxl.unet.mid_block.resnets[0].conv1
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    for hooks, kept in ((layer.memory.hooks, False), (model.nullcontext, True)):
        with hooks():
            output = layer(x)
        if kept:
            node: Any = output.grad_fn  # of the layout
            assert node.next_functions[0][0]._saved_weight is not None
        assert torch.autograd.grad(output.sum(), x)[0].shape == x.shape
    assert layer.memory.live == {} or all(entry() is not None for entry in layer.memory.live.values())


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_runs_train_beside_a_narrow_base_and_resume_bitwise(
    config: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    adapter = {"rank": 2, "targets": "linear", "parts": ["unet", "text_encoder_2"]}
    found, steps = {}, {"learning_rate": 1e-2, "checkpoint_every": 1}
    for name, frozen_as, until in (("whole", kind, 2), ("parted", kind, 1), ("parted", kind, 2), ("full", "auto", 1)):
        options = {**steps, "frozen": frozen_as, "steps": until}
        output = train(config(adapter=adapter, train=options, output_dir=str(tmp_path / name)))
        found[name] = (
            [row["loss"] for row in read_metrics(output / "metrics.jsonl")],
            load_file(output / "pytorch_lora_weights.safetensors"),
        )
    (whole, one), (parted, two) = found["whole"], found["parted"]
    assert whole == parted
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {t.dtype for t in one.values()} == {torch.float32}
    assert whole[0] == pytest.approx(found["full"][0][0], rel=0.05)
    assert whole[0] != found["full"][0][0]


def test_bitsandbytes_does_not_advertise(caplog: pytest.LogCaptureFixture) -> None:
    """On CPUs that have bf16 it tells of a kernel on a hub whenever it is imported; all else that it says is heard."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_what_no_backward_pass_reads_is_forgotten(config: Callable[..., Any]) -> None:
    """The last layer of the first encoder leads nowhere, so nothing clears what autograd kept for it; kept as it is, an
    operation's own output would hold itself for ever, a few megabytes more in every step."""
    from sdxl_trainer import setup
    from sdxl_trainer.data import loader
    from sdxl_trainer.run import CONTINUE
    from sdxl_trainer.train import train_step

    options = config(adapter={"rank": 2, "parts": ["unet", "text_encoder"]}, train={"steps": 4, "workers": 0})
    job = setup.prepare_job(options, CONTINUE)
    assert job is not None
    job.metrics.close()
    job.validation.close()
    counts = []
    for _, images, batches in loader.steps(job.samples, job.order, 0, 4, 2, 0, 1, workers=0, pin=False):
        train_step(job.run, job.state, batches, images)
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        counts.append(sum(tensor.grad_fn is not None for tensor in tensors))
    assert counts[3] <= counts[0]
