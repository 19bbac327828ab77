"""What a run shows and leaves: pictures, logs, further files, the hub."""

from typing import Literal

from sdxl_trainer.config.section import Every, Fraction, InsidePath, PathText, Positive, Section, Side, Text, option


class Validation(Section):
    prompts: tuple[str, ...] = option((), "prompts of the validation pictures")
    negative: Text = option(None, "negative prompt; default: the pipeline's own unconditional embedding")
    images: Positive = option(4, "pictures per prompt")
    seed: int | None = option(None, "first seed of each prompt's pictures; default: the run's seed")
    steps: Positive = option(25, "denoising steps")
    guidance: float = option(5.0, "classifier-free guidance scale", ge=0)
    height: Side | None = option(None, "default: that of the first data set's squarest pictures")
    width: Side | None = option(None, "default: that of the first data set's squarest pictures")
    image: PathText | None = option(None, "picture that the validation pictures begin with; a refiner needs one")
    mask: PathText | None = option(None, "what of it is drawn anew: white; an inpainting model needs one")
    strength: Fraction | None = option(None, "how much of it is drawn anew; default: 0.75, under a mask 1")
    every_epochs: Positive | None = option(None, "pictures after epochs 0, n, 2n, ... (counted from 0)")
    at_start: bool = option(False, "pictures of the base, before the first step")
    at_end: bool = option(True, "pictures of the final model")
    loss_every: Every | None = option(
        None,
        'steps, or text such as "2 epochs", between measures of the loss on the held-out pictures and a fixed part of'
        " the trained ones",
    )
    loss_timesteps: Positive = option(4, "equal parts of the schedule in each of which a picture is measured once")
    trained_pictures: int = option(16, "how many trained pictures are measured too", ge=0)
    caption_gain: bool = option(
        False, "by how much captions lower the loss of the held-out pictures: they are measured without them too"
    )
    keep_best: bool = option(
        False, "the result is the model when its validation loss was lowest; its checkpoint is always kept"
    )
    stop_after: Positive | None = option(None, "end the run after so many measures without a lower validation loss")


class Log(Section):
    trackers: tuple[str, ...] = option((), "any of tensorboard, wandb, or another tracker of accelerate")
    dir: InsidePath = option("logs", "folder of the trackers, under output_dir")
    project: str = option("sdxl-trainer", "project name for the trackers")
    pictures: bool = option(
        False, "each picture's own loss too: in metrics.jsonl under pictures, for trackers as loss_for_NAME"
    )
    every: Positive | None = option(None, "steps between reading losses from the device; default: 1 on CPU, else 10")


class Export(Section):
    formats: tuple[Literal["kohya", "embeddings", "single"], ...] = option(
        (),
        "more files at the end: kohya (an adapter for ComfyUI, A1111, Forge), embeddings (all new words as NAME_emb),"
        " single (a whole model in one file)",
    )
    name: Text = option(None, "name of the files, without .safetensors; default: the name of output_dir")
    dtype: Literal["fp32", "fp16", "bf16"] | None = option(None, "type of the numbers in them; default: as trained")
    metadata: Literal["full", "minimal", "none"] = option(
        "full", "what headers say: everything with tags and settings, what readers need, or nothing"
    )
    trigger: Text = option(None, "words that call up what was learned, for UIs to insert; default: the data's trigger")
    author: Text = option(None, "who made it")
    description: Text = option(None, "what it does")
    license: Text = option(None, "licence; default: the base model's, where it is known")


class Hub(Section):
    push: bool = option(False, "upload the result to the Hugging Face hub at the end")
    id: Text = option(None, "repository id; default: the name of output_dir")
    private: bool = option(False, "make a new repository private")
