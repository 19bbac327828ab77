"""Configs of other trainers: what they mean here, and that every option is accounted for."""

import contextlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import arrivals, configfile
from sdxl_trainer.arrivals import account, reading
from sdxl_trainer.errors import UserError
from tests.bad_inputs.place import run_here

FIXTURES = Path(__file__).parent / "fixtures" / "arrivals"
SOURCES = ("kohya-lora.toml", "kohya-full.sh", "kohya-gui.json", "diffusers.sh", "onetrainer.json")
SOURCES += ("simpletuner.json", "ai-toolkit.yaml", "diffusers-dreambooth.sh")


@pytest.fixture
def here(base: Path, pictures: Path, tmp_path: Path) -> Iterator[Path]:
    """A working folder with the configs, a model and pictures by the names that the configs use."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "base").symlink_to(base)
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copytree(pictures, tmp_path / "photos" / "10_sks dog")
    (tmp_path / "photos" / "10_sks dog" / "metadata.jsonl").unlink()
    with contextlib.chdir(tmp_path):
        yield tmp_path


def converted(name: str) -> tuple[Any, list[str]]:
    lines = arrivals.convert(Path(name), Path("ours.toml"), None, None, overwrite=True)
    return configfile.load(Path("ours.toml")), lines


def lines_of(fate: str, lines: list[str]) -> str:
    return "\n".join(line for line in lines if line.startswith(fate))


@pytest.mark.parametrize("name", SOURCES)
def test_the_result_passes_the_check(name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert run_here(["convert", name, "ours.toml"], monkeypatch) == 0
    # What this machine has not, and what one folder of pictures cannot have.
    small = ["train.precision=fp32", "train.weights=fp32"] if "full" in name else ["train.precision=fp32"]
    if name in {"kohya-full.sh", "simpletuner.json"}:
        small += ["data.0.kohya_folders=false", "data.0.caption_per_line=false"]
    assert run_here(["check", "ours.toml", *small], monkeypatch) == 0, capfd.readouterr().err


def leaves(tree: Any) -> set[str]:
    """The names of all options of a config, without those of its tables."""
    if isinstance(tree, list):
        return {name for entry in tree for name in leaves(entry)} if any(isinstance(e, dict) for e in tree) else set()
    found = set()
    for name, value in tree.items() if isinstance(tree, dict) else ():
        inner = leaves(value) if isinstance(value, dict | list) else set()
        found |= inner or {str(name).removeprefix("--")}
    return found


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.endswith(".sh")])
def test_every_option_of_the_source_is_accounted_for(name: str, here: Path) -> None:
    _, lines = converted(name)
    told = "\n".join(lines)
    # The page for adapters calls some options otherwise, and networks take theirs as arguments.
    renamed = {"max_resolution": "resolution", "epoch": "max_train_epochs", "LoRA_type": "network_module"}
    renamed |= {"optimizer": "optimizer", "lr_warmup": "lr_warmup_steps", "LyCORIS_preset": "preset"}
    renamed |= {"sdxl_no_half_vae": "no_half_vae", "additional_parameters": "max_grad_norm", "job": "job"}
    # Names of files that were read, and what is told as one: betas, tables that stay whole, other models' parts.
    read = {
        "dataset_config",
        "data_backend_config",
        "concept_file_name",
        "version",
        "beta1",
        "beta2",
        "enable",
        "count",
    }
    for option in leaves(reading.tree(Path(name))) - read:
        assert re.search(rf"\b{re.escape(renamed.get(option, option))}\b", told), f"nothing is said of {option}"


def test_what_is_not_known_is_told_and_written_as_a_comment(here: Path) -> None:
    _, lines = converted("kohya-lora.toml")
    assert lines_of("unknown", lines) == "unknown  my_new_option = 7: not known here; nothing of it is in the result"
    assert "# unknown  my_new_option = 7" in Path("ours.toml").read_text()


def test_secrets_are_not_written(here: Path) -> None:
    _, lines = converted("kohya-lora.toml")
    assert "dropped  wandb_api_key = ***" in lines_of("dropped", lines)
    assert "0123456789" not in Path("ours.toml").read_text() + "\n".join(lines)


def test_a_lora_of_kohya(here: Path) -> None:
    config, lines = converted("kohya-lora.toml")
    # 2 pictures of the data set's own batch, 4 times accumulated; the option's 3 is not looked at.
    assert (config.train.batch_size, config.train.micro_batch) == (8, 2)
    assert "train_batch_size = 3" in lines_of("dropped", lines)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.conv_rank, config.adapter.conv_alpha) == (
        32,
        16,
        8,
        4,
    )
    assert config.adapter.parts == ("unet", "text_encoder", "text_encoder_2")
    # LoRA+ of the UNet alone; the text encoders have rates of their own.
    assert [(rule.match, rule.learning_rate) for rule in config.learn] == [
        (r"unet\..*\.lora_B\..*", pytest.approx(8e-4)),
        (r"unet\..*", 2e-4),
        (r"text_encoder\..*", 1e-5),
        (r"text_encoder_2\..*", 5e-6),
    ]
    assert (config.schedule.name, config.schedule.cycles, config.schedule.warmup_steps) == (
        "cosine_with_restarts",
        3,
        60,
    )
    assert (config.text.long_captions, config.text.max_chunks) == ("kohya", 3)
    assert (config.timesteps.bias, config.timesteps.begin, config.timesteps.end) == ("range", 100, 1000)
    subject, regular = config.data
    assert (subject.repeats, subject.shuffle_tags, subject.keep_tags, subject.caption_prefix) == (10, True, 2, "sks, ")
    assert (subject.bucket_step, subject.bucket_min, subject.bucket_max) == (32, 32, 128)
    assert (regular.regularisation, regular.weight, regular.caption, regular.keep_tags) == (True, 0.5, "dog", 0)
    assert (config.output_dir, config.export.name, config.export.dtype) == ("out/mine", "mine", "fp16")


def test_a_whole_model_of_kohya_from_a_script_that_is_not_run(here: Path) -> None:
    config, _ = converted("kohya-full.sh")
    assert not Path("was-run").exists()
    assert config.adapter is None
    assert config.train.batch_size == 2 * 4 * 2  # pictures, accumulation, processes
    assert [(rule.match, rule.learning_rate) for rule in config.learn] == [
        (r"unet\..*", 1e-5),
        (r"text_encoder\..*", 3e-6),  # the second encoder's rate is 0: it stays as it is
    ]
    assert config.data[0].bucket_sizes == ((64, 128),)
    objective = config.objective
    assert (objective.prediction, objective.zero_terminal_snr, objective.weighting) == ("v_prediction", True, "epsilon")
    assert (config.train.weights, config.optimizer.name, config.optimizer.weight_decay) == ("bf16", "adafactor", 0.0)


def test_the_window_of_kohya(here: Path) -> None:
    config, lines = converted("kohya-gui.json")
    assert (config.adapter.kind, config.adapter.parts, config.adapter.rank) == ("lokr", ("unet",), 8)
    assert config.data[0].kohya_folders
    # Its warm-up is percent of a number of steps that only the data decide; noise offset is not of type Multires.
    assert "lr_warmup_steps = 0.1" in lines_of("dropped", lines)
    assert (config.objective.noise_offset, config.objective.pyramid_levels) == (0.0, 6)
    assert config.optimizer.name == "prodigy"
    assert config.train.learning_rate == 1.0
    # Prodigy's own defaults are not ours, so they are written down.
    assert config.optimizer.arguments == {"d_coef": 2, "use_bias_correction": True, "safeguard_warmup": False}
    assert config.optimizer.weight_decay == 0.0
    assert config.validation.prompts == ("a red circle", "a green square")
    assert (config.validation.negative, config.validation.steps) == ("blurry", 8)
    assert config.train.max_grad_norm == 0.5


def test_a_command_of_diffusers_means_what_the_script_here_does(here: Path) -> None:
    config, lines = converted("diffusers.sh")
    assert (config.train.batch_size, config.train.micro_batch, config.train.steps) == (8, 1, 30)
    assert (config.data[0].caption_dropout, config.data[0].flip, config.data[0].crop) == (0.2, True, "center")
    assert config.train.learning_rate == 1e-6
    assert "D8 in docs/compat.md" in lines_of("note", lines)


def test_dreambooth_of_diffusers(here: Path) -> None:
    config, _ = converted("diffusers-dreambooth.sh")
    assert (config.adapter.rank, config.adapter.parts) == (8, ("unet", "text_encoder", "text_encoder_2"))
    assert [data.caption for data in config.data] == ["a photo of sks dog", "a photo of dog"]
    assert (config.data[1].path, config.data[1].regularisation, config.data[1].generate) == ("class", True, 4)
    assert config.seed == 3


def test_onetrainer(here: Path) -> None:
    config, lines = converted("onetrainer.json")
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("dora", 8, 2.0)
    assert (config.train.batch_size, config.train.micro_batch, config.train.frozen) == (6, 2, "nf4")
    assert {rule.match: rule.learning_rate for rule in config.learn} == {r"unet\..*": 2e-4, r"text_encoder\..*": 5e-5}
    assert (config.data[0].resolution, config.data[0].more_resolutions) == (128, (64,))
    assert (config.data[0].repeats, config.data[0].weight, config.data[0].keep_tags) == (3.0, 0.5, 2)
    assert len(config.data) == 1  # the second concept is switched off
    timesteps = config.timesteps
    assert (timesteps.density, timesteps.location, timesteps.scale) == ("logit_normal", 0.25, 1.5)
    assert config.objective.snr_gamma == 4.0
    assert config.objective.input_perturbation == 0.0  # theirs changes the target too
    assert "perturbation_noise_weight = 0.1" in lines_of("dropped", lines)
    assert config.optimizer.betas == (0.9, 0.99)


def test_simpletuner(here: Path) -> None:
    config, lines = converted("simpletuner.json")
    data = config.data[0]
    assert data.repeats == 5.0  # 4 times more, after the first
    assert (data.crop, data.shuffle_tags, data.keep_tags, data.caption_variants) == ("random", True, 1, 3)
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("dora", 8, 8.0)
    assert (config.optimizer.name, config.train.gradient_checkpointing) == ("adamw", 0.5)
    assert (config.train.frozen, config.train.batch_size, config.objective.noise_offset) == ("int8", 4, 0.02)
    assert (config.validation.width, config.validation.height) == (64, 96)
    assert "crepa_lambda = 0.5" in lines_of("unknown", lines)


def test_ai_toolkit(here: Path) -> None:
    config, _ = converted("ai-toolkit.yaml")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.conv_rank) == (16, 8.0, 4)
    assert (config.train.batch_size, config.train.micro_batch, config.train.frozen) == (6, 2, "fp8")
    data = config.data[0]
    assert (data.resolution, data.more_resolutions, data.no_upscale, data.trigger) == (96, (64,), True, "sks dog")
    # They count timesteps from the noisy end: 0 to 799 there are 999 to 200.
    timesteps = config.timesteps
    assert (timesteps.bias, timesteps.begin, timesteps.end, timesteps.density) == ("range", 200, 1000, "cubic")
    assert config.validation.prompts == ("sks dog in a park",)
    assert config.ema.decay == 0.99


def test_defaults_of_kohya_that_are_not_ours_are_written_down(here: Path) -> None:
    Path("small.toml").write_text(
        'pretrained_model_name_or_path = "base"\ntrain_data_dir = "photos"\nresolution = "1024"\nenable_bucket = true\n'
        'network_module = "networks.lora"\noutput_dir = "o"\n'
    )
    config, lines = converted("small.toml")
    assert (config.adapter.rank, config.adapter.alpha) == (4, 1.0)
    assert (config.train.steps, config.train.learning_rate, config.train.precision) == (1600, 2e-6, "fp32")
    assert (config.data[0].bucket_min, config.data[0].bucket_max) == (256, 1024)
    assert "assumed  adapter.alpha = 1.0: the default of network_alpha" in lines


@pytest.mark.parametrize("name", ["kohya-lora.toml", "ai-toolkit.yaml"])
def test_a_caption_that_is_left_out_is_the_empty_one_as_there(name: str, here: Path) -> None:
    """sd-scripts and ai-toolkit encode ''; ours are the zeros of SDXL's pipeline unless told otherwise."""
    config, lines = converted(name)
    assert config.data[0].caption_dropout == 0.05
    assert config.text.dropped_caption == "empty"
    assert "text.dropped_caption" in lines_of("assumed", lines)


def test_kohya_s_learning_rates_of_blocks_are_those_of_our_names(base: Path) -> None:
    """Each parameter of the UNet is decided by exactly one of the 23 patterns."""
    from diffusers import UNet2DConditionModel

    from sdxl_trainer import blueprint
    from sdxl_trainer.arrivals.kohya_network import UNET_BLOCKS

    config = dict(blueprint.configs(blueprint.SIZES["sdxl"])["unet"])
    import torch

    with torch.device("meta"):
        names = [f"unet.{name}" for name, _ in UNet2DConditionModel.from_config(config).named_parameters()]
    counts = [sum(re.fullmatch(pattern, name) is not None for pattern in UNET_BLOCKS) for name in names]
    assert set(counts) == {1}
    assert all(any(re.fullmatch(pattern, name) for name in names) for pattern in UNET_BLOCKS)


def test_kohya_s_ranks_of_blocks(here: Path) -> None:
    text = Path("kohya-lora.toml").read_text()
    ranks = ",".join(str(number) for number in range(1, 24))
    Path("blocks.toml").write_text(text.replace('"conv_dim=8", "conv_alpha=4"', f'"block_dims={ranks}"'))
    config, _ = converted("blocks.toml")
    # Blocks with attention, by their numbers there: 4 in input blocks 4, 5, 7, 8; the middle; output blocks 0 to 5.
    assert list(config.adapter.ranks.values()) == [6, 7, 9, 10, 12, 14, 15, 16, 17, 18, 19]
    Path("blocks.toml").write_text(text.replace('"conv_dim=8", "conv_alpha=4"', f'"block_dims=0{ranks[1:]}"'))
    assert next(iter(converted("blocks.toml")[0].adapter.ranks.values())) == 6
    Path("blocks.toml").write_text(
        text.replace('"conv_dim=8", "conv_alpha=4"', f'"block_dims={ranks.replace("6,", "0,", 1)}"')
    )
    config, lines = converted("blocks.toml")
    assert config.adapter.ranks == {}
    assert "network_args.block_dims" in lines_of("dropped", lines)


def test_arguments_are_read_and_never_evaluated() -> None:
    found = account.pairs(["betas=0.9,0.99", "weight_decay=0.1", "x=__import__('os').getcwd()", "on=True"], "here")
    assert found == {"betas": [0.9, 0.99], "weight_decay": 0.1, "x": "__import__('os').getcwd", "on": True}


def test_yaml_makes_no_objects(here: Path) -> None:
    Path("bad.yaml").write_text("config: !!python/object/apply:os.mkdir [made]\n")
    with pytest.raises(UserError, match="cannot be read as yaml"):
        reading.tree(Path("bad.yaml"))
    assert not Path("made").exists()


def test_an_existing_file_is_left_alone_unless_asked(here: Path) -> None:
    Path("ours.toml").write_text("mine")
    with pytest.raises(UserError, match="DST exists"):
        arrivals.convert(Path("ai-toolkit.yaml"), Path("ours.toml"), None, None, overwrite=False)
    assert Path("ours.toml").read_text() == "mine"


JUNK = ("junk", "", -1, 3e4, None, True, [], [1, "x"], {"a": 1}, [[1]])


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with another value at a path."""
    made = json.loads(json.dumps(tree))
    node = made
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return made


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.endswith(".sh")])
def test_whatever_a_value_is_it_is_converted_or_refused(name: str, here: Path) -> None:
    source = arrivals.identify(Path(name), None)
    for path in places(source.tree):
        for value in JUNK:
            changed = replace(source, tree=replaced(source.tree, path, value))
            with contextlib.suppress(UserError):
                arrivals.understood(changed, None)


BAD = {
    "sd1.sh": ("accelerate launch train_network.py --network_dim 4\n", "'train_network.py' is not a script"),
    "none.sh": ("echo hello\n", "no training command"),
    "quote.sh": ('python sdxl_train.py --output_dir "x\n', "the command cannot be read"),
    "broken.toml": ("a = = 1\n", "cannot be read as toml"),
    "broken.json": ("{", "cannot be read as json"),
    "list.yaml": ("- 1\n- 2\n", "no job of ai-toolkit"),
    "flux.yaml": (
        "job: x\nconfig: {process: [{model: {name_or_path: x, arch: flux}}]}\n",
        "trains flux, not SDXL",
    ),
    "sd15.json": (json.dumps({"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15"}), "not SDXL base"),
    "flux.json": (json.dumps({"model_family": "flux", "data_backend_config": "x.json"}), "'flux', not SDXL"),
    "nodata.toml": ('network_module = "networks.lora"\nresolution = 64\n', "names no pictures"),
    "number.toml": (
        'train_data_dir = "photos"\nresolution = 64\nlearning_rate = "fast"\n',
        "learning_rate = 'fast' is not a number",
    ),
    "glora.toml": (
        'train_data_dir = "photos"\nresolution = 64\nnetwork_module = "lycoris.kohya"\nnetwork_args = ["algo=glora"]\n',
        "'glora' of LyCORIS is not available",
    ),
    "adopt.toml": ('train_data_dir = "photos"\nresolution = 64\noptimizer_type = "Adopt"\n', "'Adopt' is not known"),
    "missing.toml": ('dataset_config = "gone.toml"\nresolution = 64\n', "there is no such file"),
    "strange.json": ('{"a": 1}', "no config that is known here"),
    "ours.toml": ('output_dir = "x"\n[[data]]\npath = "y"\n[train]\nsteps = 1\n', "a config of ours already"),
    "data.toml": ("[[datasets]]\nresolution = 64\n", "only the part that names the pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_end_in_three_lines(name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    content, says = BAD[name]
    Path(name).write_text(content)
    assert run_here(["convert", name, "new.toml"], monkeypatch) == 2
    said = capfd.readouterr()
    assert [line[:6] for line in said.err.splitlines()] == ["error:", "   at:", "  fix:"], said.err
    assert says in said.err
    assert said.out == ""
    assert not Path("new.toml").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("--from", "kohia"), "there is no trainer 'kohia'"),
        (("--data", "gone.toml"), "cannot be read"),
        (("--rank", "4"), "--rank has no effect on a config"),
    ],
)
def test_bad_options(
    command: tuple[str, ...], says: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert run_here(["convert", "kohya-lora.toml", "new.toml", *command], monkeypatch) == 2
    assert says in capfd.readouterr().err
    assert not Path("new.toml").exists()


def test_the_written_file_is_the_config_that_was_checked(here: Path) -> None:
    config, _ = converted("kohya-lora.toml")
    assert tomllib.loads(Path("ours.toml").read_text())["adapter"]["rank"] == config.adapter.rank == 32
