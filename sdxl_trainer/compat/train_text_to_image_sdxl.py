"""`train_text_to_image_sdxl.py` of the Hugging Face examples: full fine-tuning."""

from functools import partial

from sdxl_trainer.compat import command, launch, steps, tables

SCRIPT = command.Script(
    name="train_text_to_image_sdxl",
    description="Fine-tune SDXL with the flags of the Hugging Face script (see docs/compat.md).",
    project="text2image-fine-tune-sdxl",
    flags=tables.TEXT_TO_IMAGE,
    steps=(steps.pictures, *steps.SHARED),
    names={"data.0.path": "--dataset_name or --train_data_dir", **steps.NAMES},
)
translate, parse, main = (partial(do, SCRIPT) for do in (command.translate, launch.parse, launch.main))
