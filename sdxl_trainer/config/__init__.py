"""The run as a value: every option, typed, with its default. TOML in, TOML out; unknown keys are refused.

Options are grouped as the sections of the file. A field's `description` is what `docs/config.md` and editors show.
"""

from pydantic import Field

from sdxl_trainer.config.data import Data
from sdxl_trainer.config.learning import Adapter, Learn, Token
from sdxl_trainer.config.model import Cache, Inpainting, Model, TextOptions, UNet
from sdxl_trainer.config.objective import Objective, Timesteps
from sdxl_trainer.config.results import Export, Hub, Log, Validation
from sdxl_trainer.config.section import PathText, Section, Text, option, steps_of
from sdxl_trainer.config.training import OPTIMIZERS, STEP_APART, Ema, LearningRate, Optimizer, Train

__all__ = [
    "OPTIMIZERS",
    "STEP_APART",
    "Adapter",
    "Cache",
    "Config",
    "Data",
    "Ema",
    "Export",
    "Hub",
    "Inpainting",
    "Learn",
    "LearningRate",
    "Log",
    "Model",
    "Objective",
    "Optimizer",
    "Section",
    "TextOptions",
    "Timesteps",
    "Token",
    "Train",
    "UNet",
    "Validation",
    "steps_of",
]


class Config(Section):
    preset: Text = option(None, "versioned preset whose values are used wherever the file gives none of its own")
    output_dir: PathText = Field(description="where everything of this run is written")
    seed: int = option(0, "seed of every draw", ge=0, lt=1 << 63)
    model: Model
    data: tuple[Data, ...] = Field(min_length=1, description="one or many data sets")
    text: TextOptions = TextOptions()
    cache: Cache = Cache()
    objective: Objective = Objective()
    inpainting: Inpainting = Inpainting()
    timesteps: Timesteps = Timesteps()
    adapter: Adapter | None = option(None, "train a small adapter and leave the model as it is")
    token: tuple[Token, ...] = option((), "new words of the text encoders (textual inversion)")
    learn: tuple[Learn, ...] = option((), "what learns, how fast; default: adapter and new words, else the UNet")
    train: Train
    optimizer: Optimizer = Optimizer()
    schedule: LearningRate = LearningRate()
    ema: Ema = Ema()
    validation: Validation = Validation()
    log: Log = Log()
    export: Export = Export()
    hub: Hub = Hub()
