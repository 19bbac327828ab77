"""`train_dreambooth_lora_sdxl.py` of the Hugging Face examples: a LoRA of a subject from a few pictures."""

from functools import partial

from sdxl_trainer.compat import command, dreambooth, launch, lora, steps, tables

SCRIPT = command.Script(
    name="train_dreambooth_lora_sdxl",
    description="Train a DreamBooth LoRA for SDXL with the flags of the Hugging Face script (see docs/compat.md).",
    project="dreambooth-lora-sd-xl",
    flags=tables.DREAMBOOTH_LORA,
    steps=(
        dreambooth.subject,
        *steps.SHARED,
        lora.adapter,
        dreambooth.prior,
        dreambooth.rates,
        dreambooth.optimizer,
        dreambooth.objective,
        dreambooth.kohya,
    ),
    names={**steps.NAMES, **lora.NAMES, **dreambooth.NAMES},
)
translate, parse, main = (partial(do, SCRIPT) for do in (command.translate, launch.parse, launch.main))
