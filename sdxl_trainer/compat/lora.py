"""Translations of the scripts that train a LoRA."""

from sdxl_trainer.compat.command import Command

# Options that these set: what to call them in messages.
NAMES = {"adapter.alpha": "--rank"}


def adapter(command: Command) -> None:
    """Alpha is the rank, A begins normally distributed, on all attention layers."""
    both = ["unet", "text_encoder", "text_encoder_2"]
    command.put("adapter.parts", both if command.flags["train_text_encoder"] else ["unet"])
    command.put("adapter.targets", "attention")
    command.put("adapter.alpha", float(command.flags["rank"]))
    command.put("adapter.init", "gaussian")
    if command.flags.get("use_dora"):
        command.put("adapter.kind", "dora")


def fifty_steps(command: Command) -> None:
    """Denoising steps of validation pictures are the pipeline's own default in that script."""
    if "prompts" in command.tree.get("validation", {}):
        command.put("validation.steps", 50)
