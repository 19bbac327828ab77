"""Where we differ from the reference on purpose, and when to say so. Why: docs/compat.md, under the same names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdxl_trainer.config import Config


@dataclass(frozen=True)
class Case:
    """One command: the config it became, its flags, which of them were given, and the number of processes."""

    config: Config
    flags: dict[str, Any]
    given: frozenset[str]
    processes: int


@dataclass(frozen=True)
class Difference:
    """A defect of the reference by its name in docs/compat.md, when it would matter, and what happens here."""

    name: str
    applies: Callable[[Case], bool]
    line: str


def _has_prompts(case: Case) -> bool:
    return bool(case.config.validation.prompts)


def _drawn_anew(case: Case) -> bool:
    data = case.config.data[0]
    return data.crop == "random" or data.flip or data.caption_dropout > 0


def _accumulates(case: Case) -> bool:
    several = case.processes > 1 or case.flags["gradient_accumulation_steps"] > 1
    return several and case.config.schedule.name != "constant"


def _other_columns(case: Case) -> bool:
    return (case.config.data[0].image_column, case.config.data[0].caption_column) != ("image", "text")


def _other_vae(case: Case) -> bool:
    model = case.config.model
    return model.vae is not None and (model.revision is not None or model.variant is not None)


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "D1",
        lambda case: case.config.data[0].crop == "random",
        "each picture is trained with the coordinates of the crop that was encoded; the script pairs it with others",
    ),
    Difference(
        "D4",
        lambda case: case.processes > 1,
        "every picture has noise and a timestep of its own; in the script all processes share theirs",
    ),
    Difference(
        "D7",
        lambda case: case.config.data[0].caption_dropout > 0,
        "a left-out caption becomes what the model's own pipeline takes for no prompt; the script encodes ''",
    ),
    Difference(
        "D8",
        _drawn_anew,
        "random crops, flips, captions and left-out captions change from epoch to epoch; the script draws them once",
    ),
    Difference(
        "D9",
        _accumulates,
        "warm-up and decay of the learning rate count optimizer steps; the script counts accumulation and processes in",
    ),
    Difference(
        "D10",
        lambda case: bool(case.flags["resume_from_checkpoint"]),
        "resuming continues with the very next pictures; the script begins the epoch again in another order",
    ),
    Difference(
        "D13",
        lambda case: case.config.objective.prediction == "sample",
        "prediction type sample learns the picture; the script subtracts the noise from the prediction first",
    ),
    Difference(
        "D14",
        lambda case: case.config.timesteps.bias == "range",
        "--timestep_bias_end is the timestep after the last, as the script computes it, not as its help says",
    ),
    Difference(
        "D18",
        lambda case: case.config.train.precision != "fp32",
        "picture sizes and crop corners stay whole numbers; the script rounds them to 16 bits",
    ),
    Difference(
        "D19",
        _has_prompts,
        "validation draws with the live weights, each picture with a seed of its own; the script reloads the pipeline",
    ),
    Difference("D31", _other_columns, "columns of any name work; the script fails unless they are image and text"),
    Difference(
        "D32",
        lambda case: case.config.ema.enabled,
        "the averaged and the raw weights are both kept; the script discards the raw ones at the end",
    ),
    Difference(
        "D35",
        _other_vae,
        "--revision and --variant are the base model's; the script looks for them in the VAE's repository too",
    ),
    Difference(
        "D38",
        lambda case: case.config.hub.push,
        "the model card names the base model's licence, and checkpoints stay here; the script uploads them",
    ),
)


def lines(case: Case) -> list[str]:
    """What to say at start-up, one line each."""
    return [f"{d.line} ({d.name} in docs/compat.md)" for d in DIFFERENCES if d.applies(case)]
