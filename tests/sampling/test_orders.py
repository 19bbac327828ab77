"""Files of prompts, grids, and what the command refuses."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_trainer import cli, sample
from sdxl_trainer.errors import UserError
from sdxl_trainer.sampling import grid, models, order, prompts, samplers
from sdxl_trainer.sampling.request import Request

LINES = """# two pictures
a cat --w 832 --h 1216 --d 7 --s 30 --l 6.5 --n blurry, dark --ss euler_a

A DOG --strength 0.5 --original-size 512x768 --sampler DPM++ 2M Karras
"""


def test_kohya_s_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(LINES, encoding="utf-8")
    assert prompts.read(path) == [
        {
            "prompt": "a cat",
            "width": 832,
            "height": 1216,
            "seed": 7,
            "steps": 30,
            "guidance": 6.5,
            "negative": "blurry, dark",
            "sampler": "euler_a",
        },
        {"prompt": "A DOG", "strength": 0.5, "original_size": (768, 512), "sampler": "DPM++ 2M Karras"},
    ]


def test_json_lines_and_toml_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat", "negative_prompt": "dark", "sample_steps": 20, "crop": [3, 4], "lora": "a.safetensors:0.5"},
        {"prompt": "a dog", "negative_prompt": "dark", "original_size": [512, 768]},
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = tmp_path / "a.toml"
    table.write_text(
        '[prompt]\nnegative_prompt = "dark"\n[[prompt.subset]]\nprompt = "a cat"\nsample_steps = 20\ncrop = [3, 4]\n'
        'lora = "a.safetensors:0.5"\n[[prompt.subset]]\nprompt = "a dog"\noriginal_size = [512, 768]\n',
        encoding="utf-8",
    )
    expected = [
        {"prompt": "a cat", "negative": "dark", "steps": 20, "crop": (3, 4), "loras": ("a.safetensors:0.5",)},
        {"prompt": "a dog", "negative": "dark", "original_size": (512, 768)},
    ]
    assert prompts.read(lines) == expected
    assert sorted(prompts.read(table), key=lambda row: row["prompt"]) == expected


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.csv", "x", "no file of prompts"),
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "a cat --q 5", "there is no option --q"),
        ("a.txt", "a cat --s many", "steps = 'many' is not a whole number"),
        ("a.txt", "a cat --original-size 5", "is not WIDTHxHEIGHT"),
        ("a.txt", " --s 5", "there is no prompt"),
        ("a.jsonl", "{", "not valid JSON"),
        ("a.jsonl", "[1]", "not an object"),
        ("a.jsonl", '{"prompt": "a", "stepss": 3}', "there is no setting 'stepss'"),
        ("a.toml", "prompt =", "not valid TOML"),
        ("a.toml", "x = 1", r"there is no \[\[prompt\]\]"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=what):
        prompts.read(tmp_path / name)


def test_a_line_of_the_file_wins_over_the_command_line(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a red circle --s 3\na blue square\n", encoding="utf-8")
    made = order.made(str(base), {"steps": 9, "seed": 4}, file=path, images=2)
    assert [(name, r.steps, r.seed) for name, r in made.pictures] == [
        ("0-0.png", 3, 4),
        ("0-1.png", 3, 5),
        ("1-0.png", 9, 4),
        ("1-1.png", 9, 5),
    ]
    assert made.pictures[0][1].height == 64, "the model's own size"


def test_a_grid_has_each_picture_as_drawn_alone(base: Path, tmp_path: Path) -> None:
    told = {"steps": 2, "seed": 3}
    axes = ("guidance=1,6", 'replace="red","blue"')
    made = order.made(str(base), told, ["a red circle"], axes=axes)
    paths = {path.name: path for path in sample.run(made, tmp_path / "grid")}
    sheet = paths.pop("grid-0-0.png")
    assert list(paths) == ["0-0-0-0.png", "0-0-0-1.png", "0-0-1-0.png", "0-0-1-1.png"]
    alone = order.made(str(base), told | {"guidance": 6.0}, ["a blue circle"])
    (single,) = sample.run(alone, tmp_path / "alone")
    with Image.open(single) as one, Image.open(paths["0-0-1-1.png"]) as two, Image.open(sheet) as whole:
        assert (np.asarray(one) == np.asarray(two)).all()
        pixels = np.asarray(whole)
        corner = pixels[-64 - 4 : -4, -64 - 4 : -4]
        assert (corner == np.asarray(one)).all(), "it lies in the sheet, last row, last column"
        labels = pixels[:, : whole.width - 2 * 68 - 4]
        assert (labels < 128).any(), "values are written beside"


def test_a_grid_over_models_loads_each_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from sdxl_trainer.sampling import models

    other = tmp_path / "other"
    shutil.copytree(base, other)
    loaded: list[str] = []
    original = models.load
    monkeypatch.setattr(models, "load", lambda name, offload: (loaded.append(name), original(name, offload))[1])
    made = order.made(str(base), {"steps": 1}, ["a red circle"], axes=("seed=1,2", f"model={base},{other}"))
    assert len(list(sample.run(made, tmp_path / "drawn"))) == 5
    assert loaded == [str(base), str(other)]


def test_axes_read_quoted_commas_and_refuse_the_rest() -> None:
    assert grid.axis('prompt="a, b",c', "--x") == grid.Axis("prompt", ("a, b", "c"))
    for text, what in (("guidance", "not an axis"), ("stepss=1,2", "not an axis"), ("steps=3", "fewer than two")):
        with pytest.raises(UserError, match=what):
            grid.axis(text, "--x")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mask": "m.png"}, "a mask without a picture"),
    ({"strength": 0.5}, "strength without a picture"),
    ({"refine_from": 0.5}, "without a refiner"),
    ({"sampler": "Eulr"}, "there is no sampler"),
    ({"height": 65}, "not a multiple of 8"),
    ({"image": "nothing.png"}, "cannot be read"),
    ({"emphasis": "a1111", "negative": "[a|b]"}, "changes the prompt"),
    ({"clip_skip": 99}, "clip_skip"),
]


@pytest.mark.parametrize(("given", "what"), REFUSED, ids=[what for _, what in REFUSED])
def test_contradictions_are_refused(base: Path, tmp_path: Path, given: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        list(sample.run(order.made(str(base), given, ["a red circle"]), tmp_path))


def test_kinds_of_models_are_told_apart(base: Path, refiner: Path, inpainting: Path, picture: Path) -> None:
    with pytest.raises(UserError, match="is a refiner: it changes pictures"):
        order.made(str(refiner), {}, ["x"])
    with pytest.raises(UserError, match="a model for inpainting"):
        order.made(str(inpainting), {"image": str(picture)}, ["x"])
    with pytest.raises(UserError, match="is no refiner"):
        order.made(str(base), {"refiner": str(base)}, ["x"])
    with pytest.raises(UserError, match="takes over from a picture"):
        order.made(str(base), {"refiner": str(refiner), "image": str(picture)}, ["x"])
    with pytest.raises(UserError, match="is no step"):
        order.made(str(base), {"image": str(picture), "strength": 0.1, "steps": 5}, ["x"])


def test_offloading_on_a_cpu_is_refused(base: Path, tmp_path: Path) -> None:
    from sdxl_trainer import distributed

    if distributed.device_type() != "cpu":
        pytest.skip("there is a device to offload from")
    with pytest.raises(UserError, match="has no effect"):
        list(sample.run(order.made(str(base), {}, ["x"]), tmp_path, offload="model"))


def test_encoders_whose_weights_are_elsewhere(base: Path, tmp_path: Path) -> None:
    """As `--offload sequential` leaves them between their calls."""
    from accelerate import cpu_offload
    from safetensors.torch import save_file

    loaded = models.load(str(base))
    request = Request("a (red:1.3) circle", seed=0, emphasis="a1111")
    expected = models.conditions(loaded, request)
    loaded.known.clear()
    for part in ("vae", "unet", "text_encoder", "text_encoder_2"):
        cpu_offload(getattr(loaded.pipeline, part), torch.device("cpu"))
    for name, tensor in models.conditions(loaded, request).items():
        assert torch.equal(tensor, expected[name])
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 32)}, tmp_path / "word.safetensors")
    with pytest.raises(UserError, match="sequential keeps no weights"):
        models.dress(loaded, (), (str(tmp_path / "word.safetensors"),))


def test_the_command(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    argv = ["sdxl", "sample", str(base), "--prompt", "a red circle", "--steps", "1", "--out", str(tmp_path / "a")]
    monkeypatch.setattr("sys.argv", [*argv, "--sampler", "Euler a", "--original-size", "100x50", "--seed", "3"])
    assert cli.guarded(cli.command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "a" / "0-0.png")
    assert [line.split()[1] for line in said.err.splitlines() if line.startswith("denoising")][-1] == "1/1"
    monkeypatch.setattr(
        "sys.argv", ["sdxl", "sample", "--like", str(tmp_path / "a" / "0-0.png"), "--out", str(tmp_path / "b")]
    )
    assert cli.guarded(cli.command) == 0
    assert (tmp_path / "a" / "0-0.png").read_bytes() == (tmp_path / "b" / "0-0.png").read_bytes()
    row = json.loads((tmp_path / "b" / "samples.jsonl").read_text())
    assert row["original_size"] == [50, 100]
    assert row["sampler"] == "Euler a"
    monkeypatch.setattr("sys.argv", ["sdxl", "sample", str(base)])
    assert cli.guarded(cli.command) == 2
    assert "there is no prompt" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*argv, "--guidance", "lots"])
    assert cli.guarded(cli.command) == 2
    assert "'lots' for '--guidance' is not a number from 0" in capsys.readouterr().err


# diffusers' DPM2 mixes NumPy and PyTorch in a way that newer ones warn of.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_s_name_is_known_or_refused_with_a_reason(base: Path, name: str, spacing: str) -> None:
    """Under A1111's name and ComfyUI's; a scheduler has what its name says."""
    facts, options = samplers.SAMPLERS[name], samplers.SPACINGS[spacing][0]
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert samplers.split(f"{facts.comfy}_{samplers.SPACINGS[spacing][1]}") == (name, spacing)
    import diffusers

    lacking = options.keys() - inspect.signature(getattr(diffusers, facts.kind).__init__).parameters.keys()
    if lacking:
        with pytest.raises(UserError, match=f"has no spacing '{spacing}'"):
            samplers.scheduler(config, f"{name} {spacing}")
        return
    made = samplers.scheduler(config, f"{name} {spacing}".upper())
    assert type(made).__name__ == facts.kind
    for key, value in {**facts.options, **options}.items():
        assert made.config[key] == value
    assert made.config["beta_end"] == config["beta_end"]
    made.set_timesteps(5)
    assert len(made.timesteps) >= 5
