"""`train_dreambooth_lora_sdxl_advanced.py` of the Hugging Face examples: new words, blocks of the UNet."""

from functools import partial

from sdxl_trainer.compat import advanced, command, dreambooth, launch, lora, steps, tables

SCRIPT = command.Script(
    name="train_dreambooth_lora_sdxl_advanced",
    description="Train a DreamBooth LoRA for SDXL with the flags of the Hugging Face script (see docs/compat.md).",
    project="dreambooth-lora-sd-xl",
    flags=tables.DREAMBOOTH_LORA_ADVANCED,
    steps=(
        dreambooth.subject,
        *steps.SHARED,
        advanced.one_picture,
        lora.adapter,
        advanced.blocks,
        dreambooth.prior,
        dreambooth.rates,
        advanced.shares,
        dreambooth.optimizer,
        dreambooth.objective,
        advanced.words,
        advanced.encoders,
        advanced.kohya,
    ),
    names={**steps.NAMES, **lora.NAMES, **dreambooth.NAMES, **advanced.NAMES},
)
translate, parse, main = (partial(do, SCRIPT) for do in (command.translate, launch.parse, launch.main))
