"""Presets keep their meaning, and a folder of pictures is enough to begin."""

import contextlib
import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trainer import configfile, files, from_folder, presets
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import single_file
from sdxl_trainer.from_folder import Wish
from tests.bad_inputs.place import run_here

PUBLISHED = Path(__file__).parent / "fixtures" / "presets.json"


def config(preset: str, **sections: object):
    tree = {"preset": preset, "output_dir": "run", "model": {"path": "base"}, "data": [{"path": "x"}, {"path": "y"}]}
    return configfile.validated({**tree, "train": {"steps": 1}, **sections}, "test")


@pytest.mark.parametrize("name", presets.names())
def test_every_value_of_a_preset_reaches_every_data_set_and_section(name: str) -> None:
    made = config(name)
    assert presets.differences(made) == []
    values = presets.read(name).values
    assert all(data.resolution == values["data"]["resolution"] for data in made.data)
    assert made.train.learning_rate == values["train"]["learning_rate"]


@pytest.mark.parametrize("name", presets.names())
def test_a_published_preset_never_changes(name: str) -> None:
    """Another value is another version. The record holds what each version's file says, comments aside."""
    published = json.loads(PUBLISHED.read_text())
    assert tomllib.loads((presets.FOLDER / f"{name}.toml").read_text()) == published[name]


def test_what_the_file_says_goes_before_the_preset() -> None:
    made = config("lora-style@1", adapter={"rank": 4}, data=[{"path": "x", "flip": False}, {"path": "y"}])
    assert made.adapter is not None
    assert (made.adapter.rank, made.adapter.alpha) == (4, 32.0)
    assert [data.flip for data in made.data] == [False, True]
    assert presets.differences(made) == [("data.0.flip", False, True), ("adapter.rank", 4, 32)]


@pytest.mark.parametrize(
    ("preset", "sections", "left_out"),
    [
        ("lora-character@1", {"objective": {"weighting": "prediction"}}, {"objective.snr_gamma"}),
        ("lora-character@1", {"adapter": {"kind": "oft"}}, {"adapter.rank", "adapter.alpha"}),
        ("full-large@1", {"optimizer": {"name": "adafactor"}}, {"optimizer.betas"}),
    ],
)
def test_what_of_a_preset_has_no_effect_beside_the_file_is_left_out(
    preset: str, sections: dict[str, dict[str, Any]], left_out: set[str]
) -> None:
    made = config(preset, **sections)
    assert left_out <= {option for option, *_ in presets.differences(made)}
    assert configfile.validated(tomllib.loads(configfile.dumps(made)), "again") == made
    option = min(left_out)
    section, name = option.split(".")
    value = presets.read(preset).values[section][name]
    with pytest.raises(UserError, match=f"{option} = .* has no effect"):
        config(preset, **{section: {**sections[section], name: value}})


def test_the_resolved_config_of_a_preset_is_the_same_config() -> None:
    made = config("lora-prodigy@1", optimizer={"weight_decay": 0.5})
    assert configfile.validated(tomllib.loads(configfile.dumps(made)), "again") == made


def test_steps_show_each_picture_as_often_as_the_preset_says_within_its_limits() -> None:
    preset = presets.read("lora-character@1")
    assert (preset.views, preset.steps, preset.values["train"]["batch_size"]) == (100, (1000, 2000), 4)
    assert [preset.steps_for(n) for n in (1, 40, 41, 61, 1000)] == [1000, 1000, 1025, 1525, 2000]


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ({"rank": 16, "alpha": 4.0}, 2.5e-5),
        ({"rank": 16}, 1e-4),
        ({"rank": 16, "alpha": 8.0, "rslora": True}, 2e-4),
        ({"kind": "oft"}, None),
    ],
)
def test_effective_learning_rate(adapter: dict, rate: float | None) -> None:
    tree = {"output_dir": "run", "model": {"path": "base"}, "data": [{"path": "x"}], "adapter": adapter}
    found = presets.effective_rate(configfile.validated({**tree, "train": {"steps": 1, "learning_rate": 1e-4}}, "test"))
    assert (found[0] if found else None) == (pytest.approx(rate) if rate else None)


@pytest.fixture
def photos(base: Path, pictures: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of six pictures without captions in the working folder."""
    shutil.copytree(pictures, tmp_path / "photos")
    (tmp_path / "photos" / "metadata.jsonl").unlink()
    with contextlib.chdir(tmp_path):
        yield Path("photos")


def test_a_folder_and_a_trigger_train_and_the_same_command_continues(
    photos: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "COARSE", -(10**18))  # what is known of files this young would not be kept at first
    command = ["train", "photos", "--trigger", "sks dog", "--model", str(base), "--preset", "lora-object"]
    short = ["validation.steps=1", "validation.images=1", "cache.workers=0", "train.checkpoint_every=1"]
    assert run_here([*command, "train.steps=2", *short], monkeypatch) == 0
    said = capfd.readouterr().err
    assert "wrote runs/photos.toml" in said
    assert "effective learning rate 0.0001 = learning rate 0.0001 x alpha 16 / rank 16" in said
    assert "train.steps 500 (6 pictures, each seen 333 times)" in " ".join(said.split())
    assert Path("runs/photos/pytorch_lora_weights.safetensors").is_file()
    given = tomllib.loads(Path("runs/photos.toml").read_text())
    assert given["preset"] == "lora-object@1"
    assert given["data"][0]["caption"] == "a photo of sks dog"
    assert given["train"]["steps"] == 500

    def left() -> dict[str, str]:
        """But for the cache, which notes what it knows of a folder once that has not changed for two seconds."""
        return {name: digest for name, digest in files.tree_hashes(Path("runs")).items() if "/cache/" not in name}

    before = left()
    assert run_here([*command, "train.steps=2", *short], monkeypatch) == 0
    assert "using runs/photos.toml as it is\nalready done: 2 steps" in capfd.readouterr().err
    assert left() == before


def test_an_edited_file_is_used_as_it_is_and_what_differs_is_told(
    photos: Path, base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wish = Wish(trigger="sks dog", model=str(base))
    from_folder.load(photos, wish, [])
    path = Path("runs/photos.toml")
    edited = path.read_text().replace("rank = 32", "rank = 8").replace("at_start = true\n", "")
    edited = edited.replace("[train]\n", "[train]\nworkers = 1\n")
    path.write_text(edited)
    capfd.readouterr()
    made = from_folder.load(photos, wish, ["train.batch_size=2"])
    assert made.adapter is not None
    assert (made.adapter.rank, made.train.batch_size) == (8, 2)
    assert capfd.readouterr().err.splitlines() == [
        "using runs/photos.toml as it is",
        "  adapter.rank = 8; the preset and the folder would give 32",
        "  train.workers = 1; the preset and the folder would leave it out",
        "  validation.at_start is not given; the preset and the folder would give true",
    ]
    assert path.read_text() == edited
    with pytest.raises(UserError, match="says preset = 'lora-character@1'; the command says 'lora-style@1'"):
        from_folder.load(photos, Wish(preset="lora-style"), [])
    assert path.read_text() == edited


def test_the_package_s_own_small_model_saves_no_memory(photos: Path) -> None:
    made = from_folder.load(photos, Wish(trigger="sks dog", model="micro"), [])
    assert (Path(made.model.path) / "model_index.json").is_file()
    assert made.data[0].resolution == 128
    assert made.train.gradient_checkpointing is False
    assert from_folder.load(photos, Wish(trigger="sks dog", model="micro"), []) == made


def test_min_snr_is_left_out_where_the_model_s_noise_does_not_go_with_it(
    photos: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert from_folder.load(photos, Wish(trigger="sks dog", model=str(base), name="usual"), []).objective.snr_gamma == 5
    for name, schedule in {
        "zero": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        "edm": {"_class_name": "EDMEulerScheduler"},
    }.items():
        other = shutil.copytree(base, tmp_path / name)
        path = other / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | schedule))
        made = from_folder.load(photos, Wish(trigger="sks dog", model=str(other), name=name), [])
        assert made.objective.snr_gamma is None
        assert made.objective.weighting == ("prediction" if name == "zero" else "sample")
        assert "not the preset's snr_gamma = 5" in capfd.readouterr().err
    one = single_file.pack(tmp_path / "zero", tmp_path / "zero.safetensors")
    made = from_folder.load(photos, Wish(trigger="sks dog", model=str(one), name="one"), [])
    assert (made.objective.snr_gamma, made.objective.weighting) == (None, "prediction")


def test_dreambooth_keeps_the_class_that_the_trigger_names(photos: Path, base: Path) -> None:
    wish = Wish(trigger="sks dog", preset="dreambooth", model=str(base))
    made = from_folder.load(photos, wish, [])
    subject, kind = made.data
    assert (subject.caption, subject.trigger) == ("a photo of sks dog", "sks dog")
    assert (kind.caption, kind.caption_only, kind.trigger) == ("a photo of dog", True, None)
    assert (kind.prior_prediction, kind.regularisation, kind.path) == (True, True, subject.path)
    # 6 pictures, 150 times, 2 of a step's 4 under their own caption: fewer than the preset's 600 steps.
    assert made.train.steps == 600
    with pytest.raises(UserError, match="needs a trigger with the class in it"):
        from_folder.begun(photos, Wish(trigger="sks", preset="dreambooth", model=str(base)), "x")


def test_another_name_is_another_run(photos: Path, base: Path) -> None:
    from_folder.load(photos, Wish(trigger="sks dog", model=str(base)), [])
    second = from_folder.load(photos, Wish(trigger="sks cat", model=str(base), name="second"), [])
    assert (second.output_dir, second.data[0].trigger) == ("runs/second", "sks cat")


def test_captions_beside_the_pictures_need_no_trigger(base: Path, pictures: Path, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        made = from_folder.load(pictures, Wish(model=str(base)), [])
    assert (made.data[0].caption, made.data[0].trigger) == (None, None)
    assert made.validation.prompts == ("a red circle",)


@pytest.mark.parametrize(
    ("name", "kohya"), [("10_sks dog", True), ("2024_summer", False), ("dogs", False), ("0_none", False)]
)
def test_folders_named_like_kohya_s_are_read_so(name: str, kohya: bool, photos: Path, base: Path) -> None:
    photos.rename("inside")
    Path("photos").mkdir()
    Path("inside").rename(f"photos/{name}")
    tree, _ = from_folder.begun(Path("photos"), Wish(trigger="sks dog", model=str(base)), "run")
    assert tree["data"][0].get("kohya_folders", False) is kohya


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff"])
def test_pictures_beside_such_a_folder_make_it_a_plain_one(ending: str, photos: Path, base: Path) -> None:
    """Of any kind that is read: as a folder of kohya's it would be refused for them."""
    photos.rename("inside")
    Path("photos").mkdir()
    Path("inside").rename("photos/10_sks dog")
    first = next(Path("photos/10_sks dog").glob("*.png"))
    Image.open(first).save(f"photos/beside.{ending}")
    tree, _ = from_folder.begun(Path("photos"), Wish(trigger="sks dog", model=str(base)), "run")
    assert "kohya_folders" not in tree["data"][0]
