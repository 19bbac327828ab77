"""How often other trainers save, draw and measure: in steps or in epochs, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_arrivals import FIXTURES, converted, here, lines_of

__all__ = ["here"]

KOHYA = """
pretrained_model_name_or_path = "base"
train_data_dir = "photos"
resolution = "1024"
network_module = "networks.lora"
network_dim = 4
output_dir = "o"
sample_prompts = "a red circle\\na blue square"
"""


def of_kohya(**options: Any) -> tuple[Any, list[str]]:
    given = {"max_train_epochs": 10, **options}
    Path("some.toml").write_text(KOHYA + "".join(f"{name} = {value}\n" for name, value in given.items()))
    return converted("some.toml")


@pytest.mark.parametrize(
    ("options", "every", "limit"),
    [
        ({"save_every_n_epochs": 2, "save_last_n_epochs": 3, "save_last_n_steps": 100}, "2 epochs", 3),
        ({"save_every_n_epochs": 1}, "1 epoch", None),
        # They would save by both; here there is one interval.
        ({"save_every_n_epochs": 1, "save_every_n_steps": 50, "save_last_n_steps": 150}, 50, 3),
        ({"save_n_epoch_ratio": 4, "save_every_n_epochs": 1}, "2 epochs", None),
        ({"save_n_epoch_ratio": 40}, "1 epoch", None),
        ({"save_n_epoch_ratio": 4, "max_train_epochs": 0, "max_train_steps": 100}, 500, None),
        ({"save_last_n_epochs": 3}, 500, None),
    ],
)
def test_checkpoints_of_kohya(here: Path, options: dict[str, Any], every: int | str, limit: int | None) -> None:
    config, lines = of_kohya(**options)
    assert (config.train.checkpoint_every, config.train.checkpoints_limit) == (every, limit)
    for name, value in options.items():
        assert not value or any(f" {name} = " in line for line in lines), f"nothing is said of {name}"


def test_a_share_of_a_run_in_steps_is_said_to_be_dropped(here: Path) -> None:
    """How many epochs the steps are is known from the data alone."""
    _, lines = of_kohya(save_n_epoch_ratio=4, max_train_epochs=0, max_train_steps=100)
    said = "save_n_epoch_ratio = 4: a share of max_train_epochs; set train.checkpoint_every"
    assert said in lines_of("dropped", lines)


def test_pictures_and_measures_of_kohya(here: Path) -> None:
    config, lines = of_kohya(sample_every_n_epochs=2, sample_every_n_steps=10, validate_every_n_epochs=3)
    assert (config.train.validate_every, config.validation.every_epochs) == ("2 epochs", None)
    assert config.validation.loss_every == "3 epochs"
    assert "sample_every_n_steps = 10: sample_every_n_epochs decides" in lines_of("dropped", lines)
    config, _ = of_kohya(sample_every_n_steps=10, validate_every_n_steps=20, validate_every_n_epochs=3)
    assert (config.train.validate_every, config.validation.loss_every) == (10, 20)


@pytest.mark.parametrize(
    ("options", "saved", "drawn"),
    [
        ({"save_every": 2, "save_every_unit": "EPOCH", "sample_after": 1, "sample_after_unit": "EPOCH"}, 2, 1),
        ({"save_every": 0, "save_every_unit": "NEVER", "backup_after": 3, "backup_after_unit": "EPOCH"}, 3, 0),
        ({"backup_after": 30, "backup_after_unit": "MINUTE", "sample_after": 9, "sample_after_unit": "MINUTE"}, 0, 0),
    ],
)
def test_onetrainer(here: Path, options: dict[str, Any], saved: int, drawn: int) -> None:
    tree = json.loads((FIXTURES / "onetrainer.json").read_text(encoding="utf-8"))
    Path("some.json").write_text(json.dumps({**tree, **options, "samples": [{"prompt": "a red circle"}]}))
    config, lines = converted("some.json")
    words = {0: None, 1: "1 epoch", 2: "2 epochs", 3: "3 epochs"}
    assert config.train.checkpoint_every == (words[saved] or 500)
    assert config.train.validate_every == words[drawn]
    if not drawn and "sample_after" in options:
        assert "set train.validate_every, in steps or epochs" in lines_of("dropped", lines)


def test_simpletuner(here: Path) -> None:
    tree = json.loads((FIXTURES / "simpletuner.json").read_text(encoding="utf-8"))
    tree |= {"--checkpoint_step_interval": 0, "--checkpoint_epoch_interval": 2, "--validation_epoch_interval": 1}
    Path("some.json").write_text(json.dumps(tree))
    config, lines = converted("some.json")
    assert (config.train.checkpoint_every, config.train.validate_every) == ("2 epochs", 50)
    assert "validation_epoch_interval = 1: validation_step_interval decides" in lines_of("dropped", lines)
