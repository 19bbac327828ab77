"""`train_text_to_image_lora_sdxl.py` of the Hugging Face examples: a LoRA from pictures with captions."""

from functools import partial

from sdxl_trainer.compat import command, launch, lora, steps, tables

SCRIPT = command.Script(
    name="train_text_to_image_lora_sdxl",
    description="Train a LoRA for SDXL with the flags of the Hugging Face script (see docs/compat.md).",
    project="text2image-fine-tune",
    flags=tables.TEXT_TO_IMAGE_LORA,
    steps=(steps.pictures, *steps.SHARED, lora.adapter, lora.fifty_steps),
    names={"data.0.path": "--dataset_name or --train_data_dir", **steps.NAMES, **lora.NAMES},
)
translate, parse, main = (partial(do, SCRIPT) for do in (command.translate, launch.parse, launch.main))
