"""Adapters through `sdxl convert`: as stock diffusers loads them, of lower rank, several as one, and extracted."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_trainer.formats import folder, header, lora, lora_math
from tests.convert.test_convert_models import load
from tests.formats.test_single_file import outputs


def with_adapter(base: Path, path: Path) -> dict[str, torch.Tensor]:
    pipeline = load(base, base)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    return outputs(pipeline)


def changes(path: Path, base: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    found = {}
    for name, module in lora.read(path).modules.items():
        part, _, rest = name.partition(".")
        weight = folder.read_weights(part, base)[f"{rest}.weight"]
        found[name] = lora_math.applied(weight, module, 1.0) - weight
    return found


def test_diffusers_loads_both_layouts_alike(
    base: Path, adapters: dict[str, Path], tmp_path: Path, convert: Callable[..., int]
) -> None:
    """The same pictures from the diffusers file and from kohya's, alpha being 3/4 of the rank; and back bitwise."""
    assert convert(adapters["lora"], tmp_path / "name.safetensors") == 0
    assert all(re.match(r"lora_(unet|te1|te2)_", name) for name in load_file(tmp_path / "name.safetensors"))
    assert convert(tmp_path / "name.safetensors", tmp_path / "back") == 0
    before, after = load_file(adapters["lora"]), load_file(tmp_path / "back/pytorch_lora_weights.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second, third = (
        with_adapter(base, path)
        for path in (
            adapters["lora"],
            tmp_path / "name.safetensors",
            tmp_path / "back/pytorch_lora_weights.safetensors",
        )
    )
    plain = outputs(load(base, base))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-5)
        assert torch.equal(first[key], third[key])
    assert (first["noise"] - plain["noise"]).abs().max() > 0.01


def test_dora_comes_back_from_kohya_as_diffusers_had_it(
    base: Path, adapters: dict[str, Path], tmp_path: Path, convert: Callable[..., int]
) -> None:
    assert convert(adapters["dora"], tmp_path / "dora.safetensors") == 0
    told = header.described(tmp_path / "dora.safetensors", "")[1]
    assert told["ss_network_module"] == "lycoris.kohya"
    assert convert(tmp_path / "dora.safetensors", tmp_path / "back") == 0
    ours, theirs = (
        with_adapter(base, tmp_path / "back/pytorch_lora_weights.safetensors"),
        with_adapter(base, adapters["dora"]),
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_metadata_of_an_adapter(adapters: dict[str, Path], tmp_path: Path, convert: Callable[..., int]) -> None:
    Image.new("RGB", (600, 400), "red").save(tmp_path / "p.png")
    words = ["--set", "trigger_phrase=sks cat", "--set", "author=me", "--preview", tmp_path / "p.png"]
    assert convert(adapters["lora"], tmp_path / "cat.safetensors", *words) == 0
    told = header.described(tmp_path / "cat.safetensors", "")[1]
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert told["ss_v2"] == "False"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "3")
    assert told["ss_output_name"] == told["modelspec.title"] == "cat"
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert told["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    with Image.open(tmp_path / "cat.preview.png") as shown:
        assert shown.size == (600, 400)
    assert convert(tmp_path / "cat.safetensors", tmp_path / "less.safetensors", "--metadata", "minimal") == 0
    less = header.described(tmp_path / "less.safetensors", "")[1]
    assert less["modelspec.trigger_phrase"] == "sks cat"
    assert not {"modelspec.author", "modelspec.thumbnail", "modelspec.date"} & less.keys()
    assert convert(tmp_path / "cat.safetensors", tmp_path / "none.safetensors", "--metadata", "none") == 0
    assert set(header.described(tmp_path / "none.safetensors", "")[1]) == {"format", lora.LAYOUT}


def test_several_as_one_is_exact(
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--weight", "0.5", "--lora", f"{adapters['other']}=-2"]
    assert convert(adapters["lora"], tmp_path / "both.safetensors", *words) == 0
    assert "exact" in capsys.readouterr().out
    first, second, both = (
        changes(path, base) for path in (adapters["lora"], adapters["other"], tmp_path / "both.safetensors")
    )
    for name, change in both.items():
        wanted = 0.5 * first[name] - 2 * second.get(name, torch.zeros(()))
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-5)
    ranks = {module.rank for module in lora.read(tmp_path / "both.safetensors").modules.values()}
    assert ranks == {4, 6}


def test_a_rank_that_is_enough_loses_nothing(
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two adapters of ranks 4 and 2 are one of rank 6, found by SVD; a sum of energy 1 finds the rank itself."""
    assert convert(adapters["lora"], tmp_path / "six.safetensors", "--lora", adapters["other"], "--rank", "6") == 0
    assert convert(adapters["lora"], tmp_path / "sum.safetensors", "--lora", adapters["other"]) == 0
    whole, six = changes(tmp_path / "sum.safetensors", base), changes(tmp_path / "six.safetensors", base)
    for name in whole:
        torch.testing.assert_close(six[name], whole[name], rtol=1e-3, atol=1e-5)
    capsys.readouterr()
    assert convert(tmp_path / "sum.safetensors", tmp_path / "found.safetensors", "--energy", "0.999999") == 0
    assert "rank 4-6 in" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_is_the_best_of_its_rank(
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    rank: int,
) -> None:
    """The error of every module is what the theorem of Eckart and Young says: the singular values that are left out."""
    assert convert(adapters["lora"], tmp_path / "small.safetensors", "--rank", rank) == 0
    said = capsys.readouterr().out
    before, after = changes(adapters["lora"], base), changes(tmp_path / "small.safetensors", base)
    lost = total = 0.0
    for name, change in before.items():
        values = torch.linalg.svdvals(change.flatten(1).double())
        error = (change - after[name]).double().norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-3, atol=1e-5)
        lost, total = lost + float(error**2), total + float(values.square().sum())
    told = re.search(r"residual ([\d.]+)%", said)
    assert told is not None
    assert float(told[1]) == pytest.approx(100 * (lost / total) ** 0.5, abs=0.02)
    assert {module.scale for module in lora.read(tmp_path / "small.safetensors").modules.values()} == {1.0}


def test_extracted_gives_the_tuned_model(
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    convert: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model that differs by a rank of 4 is found with rank 4; one of rank 2 leaves what singular values say."""
    assert convert(base, tmp_path / "tuned", "--lora", adapters["lora"]) == 0
    target = tmp_path / "found/pytorch_lora_weights.safetensors"
    assert convert(tmp_path / "tuned", target, "--extract-from", base, "--rank", "4") == 0
    said = capsys.readouterr().out
    assert "residual 0.00%" in said
    assert lora.read(target).modules.keys() == lora.read(adapters["lora"]).modules.keys()
    ours, theirs = with_adapter(base, target), outputs(load(tmp_path / "tuned", base))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-3)
    assert convert(tmp_path / "tuned", tmp_path / "two.safetensors", "--extract-from", base, "--rank", "2") == 0
    residual = re.search(r"residual ([\d.]+)%", capsys.readouterr().out)
    assert residual is not None
    assert 10 < float(residual[1]) < 80
    assert convert(tmp_path / "tuned", tmp_path / "e.safetensors", "--extract-from", base, "--energy", "0.9") == 0
    for name, change in changes(tmp_path / "e.safetensors", base).items():
        wanted = changes(adapters["lora"], base)[name] if name.endswith("layers.0.self_attn.q_proj") else None
        if wanted is not None:
            assert (change - wanted).norm() ** 2 <= 0.1001 * wanted.norm() ** 2


def test_lycoris_kinds_become_loras(tmp_path: Path, convert: Callable[..., int]) -> None:
    """LoHa and LoKr, on matrices and convolutions, as plain LoRAs of a rank that is enough."""
    from tests.formats.test_lora import IN, MODULES, OUT

    for kind in ("LoHa", "LoKr", "LoHa of a convolution", "LoKr of a convolution"):
        name, module = MODULES[kind]
        path, target = tmp_path / f"{kind}.safetensors", tmp_path / f"{kind} as LoRA.safetensors"
        lora.write(lora.Adapter({name: module}), path, "kohya", {})
        assert convert(path, target, "--rank", "200") == 0
        again = lora.read(target).modules[name]
        assert again.kind == "lora"
        shape = (OUT, IN, 3, 3) if "convolution" in kind else (OUT, IN)
        torch.testing.assert_close(
            lora_math.change(again, shape), lora_math.change(module, shape), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr, whole in parts"])
def test_folders_of_peft(base: Path, tmp_path: Path, convert: Callable[..., int], kind: str) -> None:
    """An adapter that peft saved is the same in kohya's layout: the merged model computes what peft does."""
    import peft

    pipeline = load(base, base)
    torch.manual_seed(0)
    options = {"r": 3, "alpha": 2, "target_modules": ["to_q", "conv1"], "init_weights": False}
    if kind.endswith("parts"):  # peft scales whole factors too, by the alpha and rank of their layers
        options |= {"rank_pattern": {"conv1": 50}, "alpha_pattern": {"conv1": 30.0}, "decompose_factor": 4}
    made = peft.LoHaConfig(**options) if kind == "loha" else peft.LoKrConfig(**options)
    plain = outputs(pipeline)
    model = peft.get_peft_model(pipeline.unet, made)
    theirs = outputs(pipeline)
    model.save_pretrained(tmp_path / "run" / "unet_adapter")
    assert convert(tmp_path / "run", tmp_path / "a.safetensors", "--base", base) == 0
    assert convert(base, tmp_path / "merged", "--lora", tmp_path / "a.safetensors") == 0
    ours = outputs(load(tmp_path / "merged", base))
    torch.testing.assert_close(ours["noise"], theirs["noise"], rtol=1e-3, atol=1e-3)
    assert (ours["noise"] - plain["noise"]).abs().max() > 1e-3
    assert json.loads(header.described(tmp_path / "a.safetensors", "")[1]["ss_network_args"])["algo"] == kind[:4]
