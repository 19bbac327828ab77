"""Single files: equal to what diffusers reads from them, whole or absent, and refused when they are not safe."""

import hashlib
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_trainer.blueprint import build
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import folder, metadata, single_file, vocabulary

CAPTIONS = ["a red circle", "two green squares"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), "tiny", captions=CAPTIONS)


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return single_file.pack(tiny, tmp_path_factory.mktemp("packed") / "tiny.safetensors")


def outputs(pipeline: object) -> dict[str, torch.Tensor]:
    """What each of the four models makes of fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (2, 77), generator=draw)
    latent, picture = (torch.randn(2, channels, 16, 16, generator=draw) for channels in (4, 3))
    with torch.no_grad():
        text = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = pipeline.text_encoder_2(ids, output_hidden_states=True)
        context = torch.cat([text, second.hidden_states[-2]], -1)
        added = {"text_embeds": second[0], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
        noise = pipeline.unet(latent, 500, context, added_cond_kwargs=added).sample
        return {
            "context": context,
            "pooled": second[0],
            "noise": noise,
            "latent": pipeline.vae.encode(picture).latent_dist.mean,
            "picture": pipeline.vae.decode(latent).sample,
        }


def assert_same_pipelines(one: object, other: object) -> None:
    mine, theirs = outputs(one), outputs(other)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    for component in folder.WEIGHTS:
        a, b = getattr(one, component).state_dict(), getattr(other, component).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_diffusers_reads_what_we_pack(tiny: Path, packed: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    ours = StableDiffusionXLPipeline.from_pretrained(tiny)
    theirs = StableDiffusionXLPipeline.from_single_file(packed, config=str(tiny), local_files_only=True)
    assert_same_pipelines(ours, theirs)


def test_diffusers_reads_the_components(tiny: Path, packed: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        theirs = kind.from_single_file(packed, config=str(tiny), subfolder=name, local_files_only=True).state_dict()
        ours = folder.read_weights(name, tiny)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_expand_gives_the_folder_back(tiny: Path, packed: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    back = single_file.expand(packed, tmp_path / "back", configs=tiny)
    names = sorted(str(path.relative_to(tiny)) for path in tiny.rglob("*"))
    assert sorted(str(path.relative_to(back)) for path in back.rglob("*")) == names
    for name in names:
        if not name.endswith(".safetensors") and (tiny / name).is_file():
            assert (back / name).read_bytes() == (tiny / name).read_bytes(), name
    one, other = (StableDiffusionXLPipeline.from_pretrained(root) for root in (tiny, back))
    assert_same_pipelines(one, other)
    assert one.tokenizer_2("a red circle!").input_ids == other.tokenizer_2("a red circle!").input_ids


def test_shipped_configurations_need_no_network(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `configs` the shipped ones of SDXL are used; here they accept anything, so that a tiny file will do."""
    with pytest.raises(UserError, match=r"unet.*(missing|another shape).*") as caught:
        single_file.expand(packed, tmp_path / "refused")
    assert "diffusers folder" in caught.value.fix
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(single_file.modules, "check", lambda *_: None)
    root = single_file.expand(packed, tmp_path / "accepted")
    for name in folder.TOKENIZERS:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(root / name)
        assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    for name in (*folder.WEIGHTS, "scheduler"):
        shipped = folder.read_config(name) | ({"torch_dtype": "float32"} if name.startswith("text") else {})
        assert folder.read_config(name, root) == shipped
    assert (root / folder.INDEX).read_bytes() == (folder.SHIPPED / folder.INDEX).read_bytes()


def test_dtypes_survive(tiny: Path, tmp_path: Path) -> None:
    parts = {name: folder.read_weights(name, tiny) for name in folder.WEIGHTS}
    half = {name: {key: value.half() for key, value in part.items()} for name, part in parts.items()} | {
        "vae": parts["vae"]
    }
    path = single_file.write(tmp_path / "half.safetensors", half, {})
    again = single_file.read(path)
    assert {tensor.dtype for tensor in again["vae"].values()} == {torch.float32}
    for name in ("unet", "text_encoder", "text_encoder_2"):
        assert {tensor.dtype for tensor in again[name].values()} == {torch.float16}
    root = single_file.expand(path, tmp_path / "half", configs=tiny)
    assert folder.read_config("text_encoder", root)["torch_dtype"] == "float16"


def test_sharded_folder(tiny: Path, packed: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(tiny / "unet").save_pretrained(tmp_path / "unet", max_shard_size="1MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    shards, whole = folder.read_weights("unet", tmp_path), folder.read_weights("unet", tiny)
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], whole[name]) for name in whole)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_v_prediction_travels_both_ways(tiny: Path, tmp_path: Path, zero_terminal_snr: bool) -> None:
    parts = {name: folder.read_weights(name, tiny) for name in folder.WEIGHTS}
    path = single_file.write(
        tmp_path / "v.safetensors", parts, {}, v_prediction=True, zero_terminal_snr=zero_terminal_snr
    )
    markers = {name: tensor.numel() for name, tensor in load_file(path).items() if "." not in name}
    assert markers == {"v_pred": 0} | ({"ztsnr": 0} if zero_terminal_snr else {})
    root = single_file.expand(path, tmp_path / "v", configs=tiny)
    schedule = folder.read_config("scheduler", root)
    assert schedule["prediction_type"] == "v_prediction"
    assert schedule.get("rescale_betas_zero_snr", False) == zero_terminal_snr
    assert schedule["timestep_spacing"] == ("trailing" if zero_terminal_snr else "leading")
    about = single_file.about(single_file.pack(root, tmp_path / "again.safetensors"))
    assert (about.v_prediction, about.zero_terminal_snr) == (True, zero_terminal_snr)
    assert about.metadata["modelspec.prediction_type"] == "v"


def test_metadata_alone_tells_v_prediction(tiny: Path, tmp_path: Path) -> None:
    parts = {name: folder.read_weights(name, tiny) for name in folder.WEIGHTS}
    entries = metadata.modelspec("title", v_prediction=True)
    assert single_file.about(single_file.write(tmp_path / "v.safetensors", parts, entries)).v_prediction
    assert not single_file.about(single_file.write(tmp_path / "e.safetensors", parts, {})).v_prediction


def test_modelspec(tiny: Path, packed: Path) -> None:
    entries = single_file.about(packed).metadata
    assert entries["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert entries["modelspec.resolution"] == "64x64"
    assert entries["modelspec.prediction_type"] == "epsilon"
    data = packed.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert entries["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[8 + length :]).hexdigest()
    lora = metadata.modelspec("a", kind="lora", resolution=(832, 1216), author="someone")
    assert lora["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert lora["modelspec.resolution"] == "832x1216"
    assert lora["modelspec.author"] == "someone"


def test_failed_write_leaves_what_was_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    parts = {name: folder.read_weights(name, tiny) for name in folder.WEIGHTS}

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        single_file.write(path, parts, {})
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_written_files_can_be_read_by_others(packed: Path, tmp_path: Path) -> None:
    """safetensors makes files of mode 0600; ours have the mode that any new file gets."""
    (tmp_path / "any").touch()
    assert packed.stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("part", list(single_file.PARTS))
def test_missing_part_is_named(tiny: Path, packed: Path, tmp_path: Path, part: str) -> None:
    prefix = single_file.sgm.PREFIX[part]
    rest = {name: tensor for name, tensor in load_file(packed).items() if not name.startswith(prefix)}
    save_file(rest, tmp_path / "part.safetensors")
    with pytest.raises(UserError) as caught:
        single_file.read(tmp_path / "part.safetensors")
    named = [name for name in single_file.PARTS.values() if name in caught.value.what]
    assert named == [single_file.PARTS[part]]
    given = {name: folder.read_weights(name, tiny) for name in folder.WEIGHTS if name != part}
    with pytest.raises(UserError) as caught:
        single_file.write(tmp_path / "never.safetensors", given, {})
    assert single_file.PARTS[part] in caught.value.what
    assert not (tmp_path / "never.safetensors").exists()


def test_tensors_of_no_component_are_reported(
    tiny: Path, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = tmp_path / "more.safetensors"
    save_file({**load_file(packed), "model_ema.decay": torch.ones(1)}, more)
    assert single_file.about(packed).unused == ()
    assert single_file.about(more).unused == ("model_ema.decay",)
    single_file.expand(packed, tmp_path / "clean", configs=tiny)
    assert not [record for record in caplog.records if record.name.startswith("sdxl_trainer")]
    single_file.expand(more, tmp_path / "more", configs=tiny)
    assert "model_ema.decay" in caplog.text


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str, legacy: bool) -> None:
    """By content, not by name: a renamed pickle is a pickle."""
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="pickle") as caught:
        single_file.read(path)
    assert "weights_only=True" in caught.value.fix
    assert caught.value.where == str(path)


def test_the_conversion_we_advise_works(packed: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.safetensors"
    torch.save({"state_dict": load_file(packed), "global_step": 3}, old)
    line = (
        single_file.TO_SAFETENSORS.split(": ", 1)[1].replace("OLD.ckpt", str(old)).replace("NEW.safetensors", str(new))
    )
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True)
    a, b = load_file(packed), load_file(new)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_broken_files_are_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(packed.read_bytes()[:-100])
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("short", "page", "empty"):
        with pytest.raises(UserError, match="safetensors file"):
            single_file.read(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="no such"):
        single_file.about(tmp_path / "absent.safetensors")


def test_reading_maps_and_does_not_copy(packed: Path) -> None:
    with safe_open(packed, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    parts = single_file.read(packed)
    queries = parts["text_encoder_2"]["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    keys = parts["text_encoder_2"]["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    assert queries.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()


def test_shipped_merges_are_complete() -> None:
    merges = vocabulary.clip_merges()
    ids = vocabulary.token_ids(merges)
    assert len(merges) == 48_894
    assert len(ids) == 49_408, "two merges that give the same token would shift every id behind them"
    assert (ids["!"], ids["!</w>"], ids[vocabulary.BOS], ids[vocabulary.EOS]) == (0, 256, 49406, 49407)
