"""Our UNet against the library's: the same numbers, names and files."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_trainer import blueprint, checkpoint, kernels
from sdxl_trainer import unet as unets

TINY = blueprint.SIZES["tiny"]


def config(**changes: Any) -> dict[str, Any]:
    return {**blueprint.configs(TINY)["unet"], **changes}


# The refiner's layout: four levels, attention in the middle ones, one depth for all.
REFINER = {
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4, 4, 4],
    "transformer_layers_per_block": 2,
    "layers_per_block": 2,
}
# Deeper where it is narrower, three resnets on the way up, heads of 16.
DEEP = blueprint.configs(
    replace(TINY, unet=blueprint.UNetSize((32, 64, 128), (2, 4, 8), (1, 2, 3), layers=2, time_dim=32, groups=16))
)["unet"]
CONFIGS = {
    "tiny": config(),
    "deep": DEEP,
    "refiner": config(**REFINER),
    "inpainting": config(in_channels=9),
    "one number of heads": config(attention_head_dim=4),
}


def pair(made: dict[str, Any]) -> tuple[Any, Any]:
    """The library's UNet, and ours with its weights; both train."""
    torch.manual_seed(0)
    theirs, ours = UNet2DConditionModel.from_config(made), unets.UNet(made)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def inputs(made: dict[str, Any], size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    pooled = made["projection_class_embeddings_input_dim"] - 6 * made["addition_time_embed_dim"]
    return {
        "sample": torch.randn(3, made["in_channels"], *size, generator=draw),
        "timestep": torch.tensor([0, 417, 999]),
        "encoder_hidden_states": torch.randn(3, 77, made["cross_attention_dim"], generator=draw),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(3, pooled, generator=draw),
            "time_ids": torch.tensor([[1024, 768, 0, 33, 1024, 1024]] * 3),
        },
    }


def differs(one: Tensor, other: Tensor) -> float:
    """Distance, relative to the size of `other`."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-9))


def step(unet: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """What it predicts, and the gradients of all that learns."""
    prediction = unet(**given, return_dict=False)[0]
    prediction.float().backward(torch.linspace(-1, 1, prediction.numel()).view(prediction.shape))
    return prediction.detach(), {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (10, 7)], ids=str)
def test_predictions_and_all_gradients_are_the_library_s(name: str, size: tuple[int, int]) -> None:
    made = CONFIGS[name]
    assert unets.fits(made)
    (theirs, wanted), (ours, found) = (step(unet, inputs(made, size)) for unet in pair(made))
    assert differs(ours, theirs) < 1e-5
    assert found.keys() == wanted.keys()
    # Some gradients are zero but for rounding: of keys where there is one place to look at.
    least = 1e-3 * max(gradient.norm() for gradient in wanted.values())
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() < 1e-4 * max(gradient.norm(), least), key


def test_bf16_is_no_further_from_fp32_than_the_library_s() -> None:
    exact, _ = pair(DEEP)
    (_, wanted), given = step(exact, inputs(DEEP)), inputs(DEEP)
    errors = []
    for unet in (u.to(torch.bfloat16) for u in pair(DEEP)):
        narrow = {key: value.bfloat16() for key, value in given.items() if key in {"sample", "encoder_hidden_states"}}
        added = {**given["added_cond_kwargs"], "text_embeds": given["added_cond_kwargs"]["text_embeds"].bfloat16()}
        found = step(unet, {**given, **narrow, "added_cond_kwargs": added})[1]
        errors.append(sum(differs(found[key], wanted[key]) for key in wanted) / len(wanted))
    assert errors[1] < 1.05 * errors[0]


def test_autocast_computes_what_the_library_computes() -> None:
    found = []
    for unet in pair(DEEP):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(unet, inputs(DEEP))[1])
    exact = step(pair(DEEP)[0], inputs(DEEP))[1]
    errors = [sum(differs(gradients[key], exact[key]) for key in exact) for gradients in found]
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_checkpointing_changes_no_bit(share: float) -> None:
    (_, plain), (_, again) = pair(DEEP), pair(DEEP)
    again.enable_gradient_checkpointing(share)
    runs = []
    blocks = [m for m in again.modules() if isinstance(m, unets.ResnetBlock2D | unets.BasicTransformerBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    (one, wanted), (other, found) = step(plain, inputs(DEEP)), step(again, inputs(DEEP))
    assert torch.equal(one, other)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert len(runs) == len(blocks) + math.ceil(share * len(blocks))


@pytest.mark.parametrize("side", [{}, {"block_out_channels": [384, 768, 1536, 1536]}], ids=["base", "refiner"])
def test_full_size_has_the_library_s_names_and_shapes(side: dict[str, Any]) -> None:
    made = blueprint.configs(blueprint.SIZES["sdxl"])["unet"]
    if side:
        heads = {"attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4, "layers_per_block": 2}
        wide = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560}
        made = {**made, **REFINER, **side, **heads, **wide}
    with torch.device("meta"):
        theirs, ours = UNet2DConditionModel.from_config(made), unets.UNet(made)
    shapes = ({name: tensor.shape for name, tensor in unet.state_dict().items()} for unet in (ours, theirs))
    assert next(shapes) == next(shapes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_type": None},
        {"transformer_layers_per_block": [1, [1, 2], [1, 2]]},  # SSD-1B
        {"use_linear_projection": False},  # SD 1
        {"addition_embed_type": None, "projection_class_embeddings_input_dim": None},
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": 256},  # LCM
        {"act_fn": "gelu"},
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3},
        {"something_new": True},
    ],
    ids=str,
)
def test_other_layouts_are_left_to_the_library(changes: dict[str, Any]) -> None:
    assert not unets.fits(config(**changes))


def save(unet: Any, folder: Path) -> None:
    checkpoint.save_part(folder, "unet", checkpoint.config_text("unet", unet), checkpoint.weights("unet", unet))


def test_what_is_saved_the_library_reads_and_back(tmp_path: Path) -> None:
    _, ours = pair(config())
    save(ours, tmp_path / "ours")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size="1MB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    read, report = unets.UNet.from_pretrained(tmp_path / "theirs", "fp16", torch.bfloat16)
    assert report == {"missing_keys": [], "mismatched_keys": []}
    assert all(torch.equal(t, read.state_dict()[n].float()) for n, t in ours.bfloat16().float().state_dict().items())


def test_missing_and_reshaped_weights_are_named(tmp_path: Path) -> None:
    _, ours = pair(config())
    save(ours, tmp_path / "ours")
    wider = unets.UNet(config(in_channels=9))
    wider.conv_norm_out.weight = None
    save(wider, tmp_path / "wider")
    (tmp_path / "wider" / "config.json").write_bytes((tmp_path / "ours" / "config.json").read_bytes())
    report = unets.UNet.from_pretrained(tmp_path / "wider")[1]
    assert report == {"missing_keys": ["conv_norm_out.weight"], "mismatched_keys": [("conv_in.weight",)]}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_layers_are_pytorch_s(bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # As attention and the layers for one place give them: not one after the other in memory.
    x = torch.randn(2, 24, 5, 7).permute(0, 2, 3, 1).requires_grad_()
    layer = kernels.Linear(24, 40, bias=bias).requires_grad_(not frozen)
    found = []
    for own in (kernels._HAS_ONEDNN, False):
        x.grad = None
        layer.zero_grad()
        monkeypatch.setattr(kernels, "_MULTIPLIES_FP32", own)
        layer(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or differs(one, other) < 1e-6


def test_linear_layers_leave_onednn_out_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = kernels.Linear(24, 40), torch.randn(6, 24)
    monkeypatch.setattr(kernels, "_MULTIPLIES_FP32", True)
    assert layer(x).grad_fn.name().startswith("_Linear") == kernels.onednn()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not kernels.onednn()
    assert not layer(x).grad_fn.name().startswith("_Linear")


# Each layer, and what it is given: channels last too, as the UNet has them.
LAYERS: dict[str, tuple[Any, Tensor]] = {
    "linear": (lambda: kernels.Linear(24, 40), torch.randn(2, 5, 24)),
    "without bias": (lambda: kernels.Linear(24, 40, bias=False), torch.randn(2, 5, 24)),
    "one place": (lambda: kernels.Conv1x1(24, 40, 1), torch.randn(2, 24, 5, 7)),
    "more of the weight": (lambda: kernels.Conv(24, 40, 3, padding=1), torch.randn(2, 24, 5, 7)),
    "more of the picture": (lambda: kernels.Conv(4, 6, 3, padding=1), torch.randn(2, 4, 16, 12)),
    "every other place": (lambda: kernels.Conv(8, 8, 3, stride=2, padding=1), torch.randn(2, 8, 9, 6)),
}


@pytest.mark.parametrize("lacks", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_bf16_are_as_exact_as_pytorch_s(
    name: str, last: bool, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on CPUs without instructions for bf16, where products are fp32: what comes out is off by one rounding."""
    torch.manual_seed(0)
    make, given = LAYERS[name]
    layer, given = make(), given.bfloat16()
    if last and given.dim() == 4:
        given = given.contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(kernels, "_LACKS_BF16", lacks)
    found = {}
    layer.bfloat16()
    for kind in (torch.bfloat16, torch.float64):
        x = given.to(kind, copy=True).requires_grad_()
        layer.to(kind).zero_grad()
        out = layer(x)
        nodes = [out.grad_fn, *(node for node, _ in out.grad_fn.next_functions if node)]
        ours = any(node.name().startswith(("_Linear", "_Conv")) for node in nodes)
        assert ours == (lacks and kind == torch.bfloat16)
        out.square().sum().backward()
        found[kind] = [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    for one, exact in zip(*found.values(), strict=True):
        assert one.dtype == torch.bfloat16
        assert differs(one, exact) < (5e-3 if lacks else 1e-2)


@pytest.mark.parametrize("learns", range(3))
@pytest.mark.parametrize("name", ["linear", "more of the weight"])
def test_layers_in_bf16_give_the_gradients_that_are_wanted(
    name: str, learns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, given = LAYERS[name]
    monkeypatch.setattr(kernels, "_LACKS_BF16", True)
    layer, x = make().bfloat16(), given.to(torch.bfloat16, copy=True)
    tensors = [x, layer.weight, layer.bias]
    for number, tensor in enumerate(tensors):
        tensor.requires_grad_(number == learns)
    layer(x).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [number == learns for number in range(3)]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ["more of the weight", "more of the picture", "every other place"])
def test_convolutions_lay_out_what_is_smaller(name: str, last: bool) -> None:
    """And give channels last, whatever they had to lay out."""
    make, given = LAYERS[name]
    layer, x = make(), given.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    found = layer(x)
    expected = F.conv2d(given, layer.weight, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def attended(function: Any, kind: torch.dtype, size: tuple[int, int, int, int]) -> list[Tensor]:
    """The result and the gradients of query, key and value for places x places, heads and numbers of each."""
    places, of_text, heads, width = size
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads * width) for length in (places, of_text, of_text, places)]
    *given, up = (torch.randn(shape, generator=draw).bfloat16().to(kind) for shape in shapes)
    leaves = [t.requires_grad_() for t in given]
    out = function(*leaves, heads)
    out.backward(up)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


NATIVE = pytest.mark.skipif(not kernels._WIDENS_BF16, reason="a CPU without instructions for bf16")


@NATIVE
@pytest.mark.parametrize("size", [(256, 256, 2, 64), (64, 77, 4, 64), (9, 5, 3, 32), (1, 1, 1, 8)])
def test_attention_in_bf16_is_as_exact_as_pytorch_s(
    size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from fp64 no more than a rounding of what is multiplied: a bf16 has 8 bits."""
    exact = attended(kernels.attention, torch.float64, size)
    found = attended(kernels.attention, torch.bfloat16, size)
    called = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_PAIRS", 0)
        patch.setattr(kernels._Attention, "apply", called.append)
        others = attended(kernels.attention, torch.bfloat16, size)
    assert not called
    for one, other, right in zip(found, others, exact, strict=True):
        assert one.dtype == torch.bfloat16
        off, of_other = (float((t.double() - right).norm()) for t in (one, other))
        assert off <= 2 * of_other + 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        for one, same in zip(found, attended(kernels.attention, torch.bfloat16, size), strict=True):
            assert torch.equal(one, same)


@NATIVE
def test_scores_of_attention_are_not_rounded_to_bf16() -> None:
    """Two keys whose scores are apart by less than bf16 tells at their size, and the switch is put back."""
    query, key = torch.full((1, 1, 64), 8.0), torch.full((1, 2, 64), 8.0)
    key[0, 1, 0] = 8.0625
    before = torch.backends.mkldnn.matmul.fp32_precision
    scores = kernels._wide_product(query.bfloat16(), key.bfloat16().mT)
    assert (scores[0, 0, 1] - scores[0, 0, 0]).item() == 0.5
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        kernels._wide_product(query.bfloat16(), key.bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@NATIVE
@pytest.mark.parametrize("learns", range(3))
def test_attention_gives_the_gradients_that_are_wanted(learns: int) -> None:
    whole = attended(kernels.attention, torch.bfloat16, (9, 5, 2, 32))

    def function(*given: Any) -> Tensor:
        parts = [t if number == learns else t.detach() for number, t in enumerate(given[:3])]
        return kernels.attention(*parts, given[3])

    found = attended(function, torch.bfloat16, (9, 5, 2, 32))
    assert [gradient is not None for gradient in found[1:]] == [number == learns for number in range(3)]
    assert torch.equal(found[1 + learns], whole[1 + learns])


def test_geglu_is_exact() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    value, gate = x.chunk(2, dim=-1)
    assert torch.allclose(kernels.geglu(x), value * F.gelu(gate), rtol=1e-12)
    assert torch.autograd.gradcheck(kernels.geglu, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norms_learn_behind_what_is_frozen(dtype: torch.dtype) -> None:
    """PyTorch's own ends the process there."""
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).to(dtype)
    ours, theirs = kernels.GroupNorm(4, 8).to(dtype), torch.nn.GroupNorm(4, 8)
    ours(x).square().sum().backward()
    theirs(x.float().contiguous()).square().sum().backward()
    assert ours.weight.grad is not None
    assert theirs.weight.grad is not None
    torch.testing.assert_close(
        ours.weight.grad.float(), theirs.weight.grad, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4
    )
    assert not x.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler imports what PyTorch has given up
def test_blocks_compile_whole_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiler stops within a block it cannot fuse what takes most of a GPU's memory traffic."""
    monkeypatch.setattr(kernels, "stands_for", "cuda")
    torch.manual_seed(0)
    blocks = {
        unets.BasicTransformerBlock(64, 4, 32): (2, 16, 64),
        unets.ResnetBlock2D(32, 64, 48, 8, 1e-5): (2, 32, 8, 8),
    }
    for block, shape in blocks.items():
        beside = torch.randn(2, 7, 32) if len(shape) == 3 else torch.randn(2, 48)
        found = []
        for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
            given = run(x, beside)
            given.square().sum().backward()
            found.append([given, x.grad, *(p.grad for p in block.parameters())])
            block.zero_grad()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
