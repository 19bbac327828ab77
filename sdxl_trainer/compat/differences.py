"""Where we differ from the reference on purpose, and when to say so. Why: docs/compat.md, under the same names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdxl_trainer.config import Config

FULL, LORA, DREAMBOOTH, ADVANCED = ALL = (
    "train_text_to_image_sdxl",
    "train_text_to_image_lora_sdxl",
    "train_dreambooth_lora_sdxl",
    "train_dreambooth_lora_sdxl_advanced",
)


@dataclass(frozen=True)
class Case:
    """One command: its script, the config it became, its flags, which of them were given, and the number of
    processes."""

    script: str
    config: Config
    flags: dict[str, Any]
    given: frozenset[str]
    processes: int


@dataclass(frozen=True)
class Difference:
    """A defect of the reference by its name in docs/compat.md, when it would matter, what happens here, and the scripts
    that have it."""

    name: str
    applies: Callable[[Case], bool]
    line: str
    scripts: tuple[str, ...] = ALL


def _has_prompts(case: Case) -> bool:
    return bool(case.config.validation.prompts)


def _drawn_anew(case: Case) -> bool:
    data = case.config.data[0]
    return data.crop == "random" or data.flip or data.caption_dropout > 0


def _sixteen_bits(case: Case) -> bool:
    return case.config.train.precision != "fp32"


def _has_class(case: Case) -> bool:
    return bool(case.flags["with_prior_preservation"])


def _learns_words(case: Case) -> bool:
    return bool(case.flags["train_text_encoder_ti"])


def _shares(case: Case) -> bool:
    return any(rule.until < 1 for rule in case.config.learn)


def _switches(case: Case) -> bool:
    """Whether a flag that takes yes or no is given as no."""
    return any(case.flags[name] is False for name in case.given if name.startswith("prodigy_"))


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
        (FULL,),
    ),
    Difference(
        "D4",
        lambda case: case.processes > 1,
        "every picture has noise and a timestep of its own; in the script all processes share theirs",
    ),
    Difference(
        "D5",
        _sixteen_bits,
        "noise is added in fp32; the script rounds it to 16 bits, which leaves none at the first timesteps",
        (LORA, DREAMBOOTH, ADVANCED),
    ),
    Difference(
        "D6",
        lambda case: case.config.train.precision == "bf16",
        "the LoRA is kept and trained in fp32; the script keeps it in bf16",
        (LORA, DREAMBOOTH, ADVANCED),
    ),
    Difference(
        "D7",
        lambda case: case.config.data[0].caption_dropout > 0,
        "a left-out caption becomes what the model's own pipeline takes for no prompt; the script encodes ''",
        (FULL,),
    ),
    Difference(
        "D8",
        _drawn_anew,
        "random crops, flips, captions and left-out captions change from epoch to epoch; the script draws them once",
        (FULL, DREAMBOOTH, ADVANCED),
    ),
    Difference(
        "D9",
        _accumulates,
        "warm-up and decay of the learning rate count optimizer steps; the script counts accumulation and processes in",
        (FULL, LORA),
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
        (FULL,),
    ),
    Difference(
        "D14",
        lambda case: case.config.timesteps.bias == "range",
        "--timestep_bias_end is the timestep after the last, as the script computes it, not as its help says",
        (FULL,),
    ),
    Difference(
        "D15",
        lambda case: _has_class(case) and case.config.objective.snr_gamma is not None,
        "--snr_gamma weights class pictures too, each by its own timestep; the script mixes the weights up, or stops",
        (DREAMBOOTH,),
    ),
    Difference(
        "D16",
        lambda case: case.config.objective.snr_gamma is not None,
        "for a base of v the weight is min(SNR, gamma) / (SNR + 1); the script takes min(SNR, gamma) / SNR + 1",
        (DREAMBOOTH, ADVANCED),
    ),
    Difference(
        "D18",
        _sixteen_bits,
        "picture sizes and crop corners stay whole numbers; the script rounds them to 16 bits",
    ),
    Difference(
        "D19",
        _has_prompts,
        "validation draws with the live weights, each picture with a seed of its own; the script reloads the pipeline",
    ),
    Difference(
        "D31", _other_columns, "columns of any name work; the script fails unless they are image and text", (FULL,)
    ),
    Difference(
        "D26",
        _has_class,
        "class pictures are trained with their own sizes and crops; the script tells the model those of the subject's",
        (DREAMBOOTH,),
    ),
    Difference(
        "D27",
        _switches,
        "a flag of prodigy given as false is off; the script takes any word for true",
        (DREAMBOOTH, ADVANCED),
    ),
    Difference(
        "D28",
        lambda case: bool(case.flags.get("output_kohya_format", case.script == ADVANCED)),
        "the second file has the true alpha, and DoRA's magnitudes where readers look for them; the script's has not",
        (DREAMBOOTH, ADVANCED),
    ),
    Difference(
        "D32",
        lambda case: case.config.ema.enabled,
        "the averaged and the raw weights are both kept; the script discards the raw ones at the end",
        (FULL,),
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
    Difference(
        "D40",
        lambda case: not _learns_words(case),
        "prompts are read with their begin and end, as a pipeline reads them; the script leaves both tokens out",
        (ADVANCED,),
    ),
    Difference(
        "D41",
        lambda case: case.config.text.clip_skip != 2 and not (_learns_words(case) or case.flags["train_text_encoder"]),
        "--clip_skip holds; in the script it is lost where the text encoders do not learn",
        (ADVANCED,),
    ),
    Difference(
        "D42",
        _shares,
        "the text encoders' share of the run is one of steps; the script rounds it down to whole epochs, one to none",
        (ADVANCED,),
    ),
    Difference(
        "D43",
        lambda case: bool(case.flags["cache_latents"]),
        "each latent keeps its own caption and size; the script's cache gives it those of other pictures",
        (ADVANCED,),
    ),
    Difference(
        "D44",
        lambda case: _has_class(case) and case.config.objective.snr_gamma is not None,
        "--snr_gamma weights class pictures too; the script leaves them as they are",
        (ADVANCED,),
    ),
    Difference(
        "D45",
        _learns_words,
        "new words move by the optimizer alone; the script also scales them after each step, even those that rest",
        (ADVANCED,),
    ),
)


def lines(case: Case) -> list[str]:
    """What to say at start-up, one line each."""
    return [
        f"{d.line} ({d.name} in docs/compat.md)" for d in DIFFERENCES if case.script in d.scripts and d.applies(case)
    ]
