"""The reference of the commands, from the commands themselves (`sdxl schema --commands`)."""

from typing import Any

HEAD = """# Commands

Made by `sdxl schema --commands` from the code. `sdxl COMMAND --help` says the same.

Exit status: 0 done; 2 something that you can mend, told in three lines; 130 or 143 interrupted, after saving.
"""


def commands(group: Any) -> str:
    """All commands of a click group as Markdown."""
    return HEAD + "".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    line = " ".join(["sdxl", name, *(_argument(p) for p in arguments), *(["[options]"] if options else [])])
    rows = [(_argument(p), p.help or "") for p in arguments] + [(_flag(p), _meaning(p)) for p in options]
    table = "".join(f"| `{what}` | {_cell(means)} |\n" for what, means in rows)
    head = "\n| | |\n| --- | --- |\n" if rows else ""
    return f"\n## sdxl {name}\n\n{command.help}\n\n```sh\n{line}\n```\n{head}{table}"


def _argument(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _flag(option: Any) -> str:
    if option.is_flag:
        return ", ".join([*option.opts, *option.secondary_opts])
    return f"{', '.join(option.opts)} {option.metavar or 'VALUE'}"


def _meaning(option: Any) -> str:
    default = option.default
    shown = not option.is_flag and default is not None and default != () and not callable(default)
    return f"{option.help or ''}{f'; default: {default}' if shown else ''}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
