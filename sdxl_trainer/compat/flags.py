"""What a flag of the reference's scripts is, and how a command line of them is read."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from sdxl_trainer.errors import UserError, closest

WHERE = "command line"

# Flags that only the advanced DreamBooth script has, for those who give them to another.
ADVANCED = (
    *("--train_text_encoder_ti", "--token_abstraction", "--num_new_tokens_per_abstraction", "--clip_skip"),
    *("--train_text_encoder_ti_frac", "--train_text_encoder_frac", "--use_blora", "--lora_unet_blocks"),
    "--cache_latents",
)


@dataclass(frozen=True)
class Flag:
    """One flag of the reference. Type bool is a switch, which takes no value. `to` is the config option that takes the
    value as it is; flags without it need another flag or the environment to be translated."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str
    to: str = ""
    choices: tuple[str, ...] | None = None
    required: bool = False

    @property
    def key(self) -> str:
        return self.name.removeprefix("--")


def truth(text: str) -> bool:
    """Yes or no, of a flag that takes a value."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


class _Parser(argparse.ArgumentParser):
    """argparse, except that mistakes are user errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, WHERE, "--help lists every flag")


def read(argv: Sequence[str], flags: Sequence[Flag], description: str) -> tuple[dict[str, Any], frozenset[str]]:
    """Every flag's value by its key (the default where it is not given), and the keys that were given."""
    parser = _Parser(description=description, formatter_class=partial(argparse.HelpFormatter, max_help_position=32))
    for flag in flags:
        _add(parser, flag)
    found, rest = parser.parse_known_args(argv)
    if rest:
        names = [flag.name for flag in flags]
        name = rest[0].partition("=")[0]  # without the value, which may be a secret
        what = f"unknown flag {name}" if name.startswith("-") else f"'{name}' belongs to no flag"
        near = closest(name, names) if name.startswith("--") else "--help lists every flag"
        near = "scripts/train_dreambooth_lora_sdxl_advanced.py has it" if name in ADVANCED else near
        raise UserError(what, WHERE, near)
    given = vars(found)
    for flag in flags:
        if flag.required and flag.key not in given:
            raise UserError(f"{flag.name} is missing", WHERE, f"add {flag.name}=... ({flag.help})")
    return {flag.key: given.get(flag.key, flag.default) for flag in flags}, frozenset(given)


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    # Suppressed, so that the namespace holds only what was given.
    common: dict[str, Any] = {"default": argparse.SUPPRESS}
    if flag.type is bool:
        parser.add_argument(flag.name, action="store_true", help=flag.help, **common)
        return
    default = " (required)" if flag.required else f" (default: {flag.default})" if flag.default is not None else ""
    text = f"{flag.help}{default}".replace("%", "%%")
    metavar = None if flag.choices else getattr(flag.type, "__name__", "").upper()
    parser.add_argument(
        flag.name, type=partial(_value, flag), choices=flag.choices, help=text, metavar=metavar, **common
    )


def _value(flag: Flag, text: str) -> Any:
    try:
        value = flag.type(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number", truth: "true or false"}[flag.type]
        fix = f"give {kind}" if flag.default is None else f"default: {flag.default}"
        raise UserError(f"{flag.name} = {text} is not {kind}", WHERE, fix) from None
    if flag.choices and value not in flag.choices:
        allowed, near = f"allowed: {', '.join(flag.choices)}", closest(value, flag.choices)
        fix = allowed if near.startswith("allowed") else f"{near} ({allowed})"
        raise UserError(f"{flag.name} = {text} is not allowed", WHERE, fix)
    return value
