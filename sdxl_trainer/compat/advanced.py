"""Translations of the advanced DreamBooth script: new words, shares of the run, blocks of the UNet."""

import re

from sdxl_trainer.compat.command import Command
from sdxl_trainer.compat.dreambooth import count, say_idle
from sdxl_trainer.compat.flags import WHERE
from sdxl_trainer.errors import UserError

# Options that these set: what to call them in messages.
NAMES = {
    "token.0.name": "--token_abstraction",
    "token.0.vectors": "--num_new_tokens_per_abstraction",
    "adapter.targets": "--lora_unet_blocks",
    "text.clip_skip": "--clip_skip",
}
_OF_WORDS = ("token_abstraction", "num_new_tokens_per_abstraction", "train_text_encoder_ti_frac")
_BLORA = "unet.up_blocks.0.attentions.0,unet.up_blocks.0.attentions.1"
_LAYERS = r"(to_[qkv]|to_out\.0)"
_OF_ENCODERS = r"text_encoder(_2)?\..*\.(q_proj|k_proj|v_proj|out_proj)"


def words(command: Command) -> None:
    """The new words, under the script's names for their first tokens; the identifier stands for them in captions."""
    flags = command.flags
    if not flags["train_text_encoder_ti"]:
        for flag in _OF_WORDS:
            say_idle(command, flag, "--train_text_encoder_ti is not given")
        return
    if flags["train_text_encoder"]:
        what = "--train_text_encoder_ti and --train_text_encoder: the encoders learn new words, or a LoRA"
        raise UserError(what, WHERE, "give one of them; a config file can have both: examples/pivotal.toml")
    vectors = flags["num_new_tokens_per_abstraction"]
    identifiers = [word for word in "".join(flags["token_abstraction"].split()).split(",") if word]
    command.tree["token"] = [
        {"name": f"<s{number * max(1, vectors)}>", "vectors": vectors, "placeholder": word}
        for number, word in enumerate(identifiers)
    ]
    if not identifiers:
        raise UserError("--token_abstraction names no word", WHERE, "give one, such as TOK")
    for data in command.tree["data"]:
        if data.get("caption"):
            data["caption"] = _named(command, data["caption"])
    validation = command.tree.get("validation", {})
    if "prompts" in validation:
        validation["prompts"] = [_named(command, prompt) for prompt in validation["prompts"]]
    command.put("export.formats", ["kohya", "embeddings"])


def _named(command: Command, prompt: str) -> str:
    """A prompt with the words' names in the place of their identifiers."""
    from sdxl_trainer.tokens import in_text

    for word in sorted(command.tree["token"], key=lambda word: -len(word["placeholder"])):
        prompt = re.sub(in_text(word["placeholder"]), word["name"], prompt)
    return prompt


def shares(command: Command) -> None:
    """The share of the run after which the text encoders stay as they are."""
    flags = command.flags
    name = "train_text_encoder_ti_frac" if flags["train_text_encoder_ti"] else "train_text_encoder_frac"
    if not flags["train_text_encoder"]:
        say_idle(command, "train_text_encoder_frac", "--train_text_encoder is not given")
    if not (flags["train_text_encoder"] or flags["train_text_encoder_ti"]):
        return
    if not 0 < flags[name] <= 1:
        what = f"--{name} = {flags[name]:g} is not a share of the run"
        raise UserError(what, WHERE, "give more than 0 and at most 1")
    command.tree["learn"][1]["until"] = flags[name]


def blocks(command: Command) -> None:
    """The blocks of the UNet that learn: a layer does whose name holds one of theirs, from dot to dot."""
    given = command.flags["lora_unet_blocks"]
    if command.flags["use_blora"]:
        say_idle(command, "lora_unet_blocks", "--use_blora names the blocks")
        given = _BLORA
    if given is None:
        return
    found = [block for block in "".join(given.split()).split(",") if block]
    wrong = [block for block in found if not block.startswith("unet.")]
    if wrong or not found:
        what = f"--lora_unet_blocks = {given}: {wrong[0] if wrong else 'it'} names no block of the UNet"
        raise UserError(what, WHERE, f"write them as in {_BLORA}")
    either = "|".join(re.escape(block.removeprefix("unet.")) for block in found)
    targets = rf"unet\.(.*\.)?({either})\.(.*\.)?{_LAYERS}"
    command.put("adapter.targets", f"{targets}|{_OF_ENCODERS}" if command.flags["train_text_encoder"] else targets)


def encoders(command: Command) -> None:
    """How many layers of the text encoders are read: here they are counted from the end."""
    if command.flags["clip_skip"] is not None:
        command.put("text.clip_skip", command.flags["clip_skip"] + 2)


def one_picture(command: Command) -> None:
    """A single picture is cut in its middle and not mirrored, as for B-LoRA."""
    first = command.tree["data"][0]
    if command.flags["instance_data_dir"] is None or count(first["path"]) * command.flags["repeats"] != 1:
        return
    if first["crop"] == "random" or first.get("flip"):
        command.notes.append("a single picture is cut in its middle and not mirrored, as the script does")
    first.update(crop="center", flip=False)


def kohya(command: Command) -> None:
    """The file for other programs is always written, called as the folder."""
    command.tree.setdefault("export", {}).setdefault("formats", ["kohya"])
