"""Adapters: read back bitwise, as stock diffusers, peft and ComfyUI read them, and with the same effect."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_trainer.formats import header, lora, lora_math, lora_names, metadata
from sdxl_trainer.formats.lora import Adapter, Module
from sdxl_trainer.formats.lora_names import Layout
from tests.formats import comfyui

LINEAR, CONV = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.1.resnets.0.conv1"
TEXT, TEXT_2 = (f"{part}.text_model.encoder.layers.0.self_attn.q_proj" for part in ("text_encoder", "text_encoder_2"))
OUT, IN, RANK = 24, 18, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


def plain(
    conv: bool = False, alpha: float | None = 3.0, magnitude: bool = False, out: int = OUT, inner: int = IN
) -> Module:
    down, up = ((inner, 3, 3), (1, 1)) if conv else ((inner,), ())
    tensors = {"lora_down": draw(RANK, *down), "lora_up": draw(out, RANK, *up)}
    return Module("lora", tensors | ({"magnitude": draw(out).abs() + 1} if magnitude else {}), alpha)


MODULES = {
    "LoRA": (LINEAR, plain()),
    "LoRA without alpha": (LINEAR, plain(alpha=None)),
    "LoRA of a convolution": (CONV, plain(conv=True)),
    "LoRA with a middle": (
        CONV,
        Module(
            "lora",
            {"lora_down": draw(RANK, IN, 1, 1), "lora_mid": draw(RANK, RANK, 3, 3), "lora_up": draw(OUT, RANK, 1, 1)},
            2.0,
        ),
    ),
    "LoHa": (
        LINEAR,
        Module(
            "loha",
            {
                f"hada_w{n}_{s}": draw(*((OUT, RANK) if s == "a" else (RANK, IN)), seed=int(n))
                for n in "12"
                for s in "ab"
            },
            3.0,
        ),
    ),
    "LoHa of a convolution": (
        CONV,
        Module(
            "loha",
            {
                **{f"hada_w{n}_{s}": draw(RANK, OUT if s == "a" else IN, seed=int(n)) for n in "12" for s in "ab"},
                **{f"hada_t{n}": draw(RANK, RANK, 3, 3, seed=int(n)) for n in "12"},
            },
            2.0,
        ),
    ),
    "LoKr": (LINEAR, Module("lokr", {"lokr_w1": draw(4, 3), "lokr_w2_a": draw(6, 2), "lokr_w2_b": draw(2, 6)}, 1.0)),
    "LoKr, both in two": (
        LINEAR,
        Module(
            "lokr",
            {"lokr_w1_a": draw(4, 2), "lokr_w1_b": draw(2, 3), "lokr_w2_a": draw(6, 2), "lokr_w2_b": draw(2, 6)},
            1.0,
        ),
    ),
    "LoKr in full": (LINEAR, Module("lokr", {"lokr_w1": draw(4, 3), "lokr_w2": draw(6, 6)})),
    "LoKr of a convolution": (CONV, Module("lokr", {"lokr_w1": draw(4, 3), "lokr_w2": draw(6, 6, 3, 3)})),
    "LoKr with a core": (
        CONV,
        Module(
            "lokr",
            {"lokr_w1": draw(4, 3), "lokr_t2": draw(2, 2, 3, 3), "lokr_w2_a": draw(2, 6), "lokr_w2_b": draw(2, 6)},
            1.0,
        ),
    ),
    "difference": (LINEAR, Module("full", {"diff": draw(OUT, IN)})),
}


def same(one: Adapter, other: Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for name, module in one.modules.items():
        again = other.modules[name]
        assert (again.kind, again.scale) == (module.kind, module.scale), name
        assert again.tensors.keys() == module.tensors.keys(), name
        for role, tensor in module.tensors.items():
            assert again.tensors[role].dtype == tensor.dtype
            assert torch.equal(again.tensors[role], tensor), (name, role)


def there_and_back(adapter: Adapter, path: Path, kind: str) -> Adapter:
    lora.write(adapter, path, kind, {})
    return lora.read(path)


@pytest.mark.parametrize("name", MODULES)
def test_kohya_gives_every_kind_back_bitwise(name: str, tmp_path: Path) -> None:
    module_name, module = MODULES[name]
    same(
        Adapter({module_name: module}),
        there_and_back(Adapter({module_name: module}), tmp_path / "a.safetensors", "kohya"),
    )


def mixed() -> Adapter:
    """Several ranks and alphas, matrices and convolutions, DoRA, and all three parts."""
    return Adapter(
        {
            LINEAR: plain(alpha=3.0, magnitude=True),
            LINEAR.replace("to_q", "to_out.0"): plain(alpha=None),
            CONV: plain(conv=True, alpha=1.5, magnitude=True),
            CONV.replace("conv1", "conv_shortcut"): Module(
                "lora", {"lora_down": draw(2, IN, 1, 1), "lora_up": draw(OUT, 2, 1, 1)}, 8.0
            ),
            TEXT: plain(alpha=2.0),
            TEXT_2: Module("lora", {"lora_down": draw(3, IN).half(), "lora_up": draw(OUT, 3).half()}, 0.1),
        }
    )


def test_diffusers_kohya_diffusers_bitwise(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{n}.safetensors" for n in "123")
    lora.write(mixed(), first, "diffusers", {})
    same(mixed(), lora.read(first))
    lora.write(lora.read(first), second, "kohya", {})
    same(mixed(), lora.read(second))
    lora.write(lora.read(second), third, "diffusers", {})
    assert first.read_bytes() == third.read_bytes()


def test_lokr_with_whole_factors_comes_back_bitwise(tmp_path: Path) -> None:
    """kohya, diffusers, kohya: beside products of two matrices, whose alpha is half their rank, whole ones, which have
    no scale; and each has an alpha in kohya's file, without which LyCORIS does not read it."""
    whole = {"lokr_w1": draw(4, 3), "lokr_w2": draw(6, 6)}
    modules = {
        LINEAR: MODULES["LoKr"][1],
        LINEAR.replace("to_q", "to_k"): Module("lokr", whole, 100_000.0),  # as LyCORIS has it: the rank asked for
        LINEAR.replace("to_q", "to_v"): Module("lokr", whole),
        CONV: MODULES["LoKr of a convolution"][1],
    }
    first, second, third = (tmp_path / f"{n}.safetensors" for n in "123")
    lora.write(Adapter(modules), first, "kohya", {})
    lora.write(lora.read(first), second, "diffusers", {})
    lora.write(lora.read(second), third, "kohya", {})
    same(Adapter(modules), lora.read(second))
    assert first.read_bytes() == third.read_bytes()
    assert sum(name.endswith(".alpha") for name in load_file(first)) == len(modules)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "difference"])
def test_comfyui_makes_the_same_of_it(name: str) -> None:
    """The change of the weight is the one that ComfyUI computes from the kohya file; alpha is honoured."""
    module_name, module = MODULES[name]
    tensors = {key: value.numpy() for key, value in lora.kohya_tensors(Adapter({module_name: module})).items()}
    weight = draw(OUT, IN, 3, 3) if module_name == CONV else draw(OUT, IN)
    theirs = comfyui.patched(weight.numpy(), lora_names.kohya(module_name), tensors, 0.7)
    np.testing.assert_allclose(
        lora_math.applied(weight.double().float(), module, 0.7).numpy(), theirs, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("conv", [False, True])
def test_comfyui_reads_magnitudes_on_the_axis_of_outputs(conv: bool) -> None:
    """With no change of the weight, a DoRA scales each output to its magnitude, in ComfyUI and here."""
    module = plain(conv=conv, magnitude=True)
    module.tensors["lora_up"].zero_()
    name = CONV if conv else LINEAR
    weight = draw(OUT, IN, 3, 3) if conv else draw(OUT, IN)
    tensors = {key: value.numpy() for key, value in lora.kohya_tensors(Adapter({name: module})).items()}
    ours = lora_math.applied(weight, module, 1.0)
    np.testing.assert_allclose(
        ours.numpy(), comfyui.patched(weight.numpy(), lora_names.kohya(name), tensors), atol=1e-5
    )
    norms = ours.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, module.tensors["magnitude"])


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "lokr full"])
@pytest.mark.parametrize("conv", [False, True])
def test_peft_computes_the_same_change(kind: str, conv: bool) -> None:
    """What peft adds to a layer is what we add, alpha and magnitudes included."""
    import peft

    layer = torch.nn.Conv2d(IN, OUT, 3, padding=1, bias=False) if conv else torch.nn.Linear(IN, OUT, bias=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight)
    name = "down_blocks.1.resnets.0.conv1" if conv else "proj_in"
    model = torch.nn.Module()
    model.add_module(name.rpartition(".")[2], layer)
    target = name.rpartition(".")[2]
    weight = layer.weight.detach().clone()
    config: object
    if kind in ("lora", "dora"):
        config = peft.LoraConfig(
            r=4, lora_alpha=3, target_modules=[target], use_dora=kind == "dora", init_lora_weights=False
        )
    elif kind == "loha":
        config = peft.LoHaConfig(r=4, alpha=3, target_modules=[target], init_weights=False, use_effective_conv2d=conv)
    else:
        rank = 4 if kind == "lokr" else 64
        config = peft.LoKrConfig(r=rank, alpha=3, target_modules=[target], init_weights=False, decompose_factor=2)
    wrapped = peft.inject_adapter_in_model(config, model)
    state = peft.get_peft_model_state_dict(wrapped)
    torch.manual_seed(1)
    x = torch.randn(2, IN, 5, 5) if conv else torch.randn(2, IN)
    with torch.no_grad():
        theirs = getattr(wrapped, target)(x)
    roles = {}
    for key, tensor in state.items():
        found = lora_names.split(key)
        assert found is not None, key
        roles[found[1]] = tensor.detach()
    values = {k: v for k, v in config.to_dict().items() if v is not None}
    module = lora._module(f"unet.{name}", roles, {"unet": values}, Path("x"))
    new = lora_math.applied(weight, module, 1.0)
    ours = torch.nn.functional.conv2d(x, new, padding=1) if conv else x @ new.T
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)


@given(
    rank=st.integers(1, 5),
    alpha=st.one_of(st.none(), st.floats(0.01, 64, allow_nan=False)),
    layout=st.sampled_from([Layout(3, 2), Layout(3, 1)]),
    where=st.sampled_from(["down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1"]),
    leaf=st.sampled_from(["transformer_blocks.0.attn2.to_out.0", "transformer_blocks.0.ff.net.0.proj", "proj_in"]),
    half=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_adapter_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    rank: int,
    alpha: float | None,
    layout: Layout,
    where: str,
    leaf: str,
    half: bool,
) -> None:
    tensors = {"lora_down": draw(rank, 5), "lora_up": draw(7, rank)}
    tensors = {name: tensor.half() if half else tensor for name, tensor in tensors.items()}
    # kohya's alpha is a number in fp32: of decimals, those come back that have no more digits than it.
    alpha = None if alpha is None else float(f"{alpha:.6g}")
    before = Adapter({f"unet.{where}.{leaf}": Module("lora", tensors, alpha)}, {}, layout)
    for kind in ("kohya", "diffusers"):
        path = tmp_path_factory.mktemp("any") / "a.safetensors"
        lora.write(before, path, kind, {})
        after = lora.read(path)
        same(before, after)
        assert after.layout == layout


def test_rank_stabilised_adapters_keep_their_scale(tmp_path: Path) -> None:
    """PEFT scales by alpha / sqrt(r), readers of kohya's layout by alpha / r: the written alpha makes up for it."""
    tensors = {f"{LINEAR}.lora_A.weight": draw(4, IN), f"{LINEAR}.lora_B.weight": draw(OUT, 4)}
    told = {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": True}
    save_file(tensors, tmp_path / "rs.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    module = lora.read(tmp_path / "rs.safetensors").modules[LINEAR]
    assert module.scale == 3 / 4**0.5
    lora.write(lora.read(tmp_path / "rs.safetensors"), tmp_path / "k.safetensors", "kohya", {})
    assert load_file(tmp_path / "k.safetensors")[f"{lora_names.kohya(LINEAR)}.alpha"].item() == 6.0


def test_a_middle_is_folded_for_diffusers(tmp_path: Path) -> None:
    module_name, module = MODULES["LoRA with a middle"]
    again = there_and_back(Adapter({module_name: module}), tmp_path / "a.safetensors", "diffusers").modules[module_name]
    assert "lora_mid" not in again.tensors
    shape = (OUT, IN, 3, 3)
    torch.testing.assert_close(lora_math.change(again, shape), lora_math.change(module, shape), rtol=1e-4, atol=1e-4)


def test_magnitudes_per_input_stay_what_they_are(tmp_path: Path) -> None:
    """Older LyCORIS files have one number per input; a square layer must not be taken for the other kind."""
    for out, inner in ((OUT, IN), (IN, IN)):
        name = lora_names.kohya(LINEAR)
        tensors = {f"{name}.lora_down.weight": draw(2, inner), f"{name}.lora_up.weight": draw(out, 2)}
        tensors |= {f"{name}.dora_scale": draw(1, inner).abs(), f"{name}.alpha": torch.tensor(2.0)}
        save_file(tensors, tmp_path / "in.safetensors")
        module = lora.read(tmp_path / "in.safetensors").modules[LINEAR]
        assert module.per_input
        weight = draw(out, inner)
        new = lora_math.applied(weight, module, 1.0)
        torch.testing.assert_close(new.norm(dim=0), module.tensors["magnitude"].flatten())
        lora.write(lora.read(tmp_path / "in.safetensors"), tmp_path / "again.safetensors", "kohya", {})
        again = load_file(tmp_path / "again.safetensors")
        assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    whole = mixed()
    entries = {f"ss_{n}": str(n) for n in range(50)}
    lora.write(whole, one, "kohya", entries)
    turned = Adapter(dict(reversed(list(whole.modules.items()))))
    lora.write(turned, other, "kohya", dict(reversed(list(entries.items()))))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("large", [False, True])
def test_hashes_are_those_of_other_tools(tmp_path: Path, large: bool) -> None:
    """As kohya computes them: over the bytes that the safetensors library writes with the `ss_*` entries alone."""
    import hashlib

    from safetensors.torch import save

    tensors = {"lora_down": draw(64, 20_000 if large else 8), "lora_up": draw(OUT, 64)}
    path = tmp_path / "a.safetensors"
    entries = metadata.with_places({"ss_a": 'ü\n"', "other": "x" * 99})
    lora.write(Adapter({LINEAR: Module("lora", tensors, 1.0)}), path, "kohya", entries)
    content, told = path.read_bytes(), header.described(path, "")[1]
    length = int.from_bytes(content[:8], "little")
    assert told["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    assert told["modelspec.hash_sha256"] == "0x" + told["sshs_model_hash"]
    theirs = save(load_file(path), {"ss_a": 'ü\n"'})
    assert told["sshs_legacy_hash"] == hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8]
