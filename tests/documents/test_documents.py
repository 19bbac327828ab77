"""The documents are true: commands parse, configs are valid and train, Python compiles, links lead somewhere."""

import ast
import importlib
import itertools
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from sdxl_trainer import cli, configfile
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GROUP = typer.main.get_command(cli.app)
# Fenced blocks as (language, text).
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Each command line of a page, in words; lines that end in a backslash go on."""
    found = []
    for text in blocks(page, "sh", "bash", ""):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(sdxl|python|accelerate|make|pip) ", line):
                found.append(shlex.split(line, comments=True))
    return found


def cases(make: Callable[[Path], list[Any]]) -> list[Any]:
    return [pytest.param(page, item, id=f"{name(page)}-{i}") for page in PAGES for i, item in enumerate(make(page))]


@pytest.mark.parametrize(("page", "words"), cases(commands))
def test_commands_are_understood(page: Path, words: list[str]) -> None:
    program, *arguments = words
    if program == "accelerate":
        arguments = list(itertools.dropwhile(lambda word: not word.endswith(".py") and word != "-m", arguments))
        program, arguments = ("sdxl", arguments[2:]) if arguments[0] == "-m" else ("python", arguments)
    if program == "sdxl" and arguments[0] not in {"--help", "COMMAND"} and "[options]" not in arguments:
        understood(arguments)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
        if arguments[0].startswith("scripts/"):
            script = importlib.import_module(f"sdxl_trainer.compat.{Path(arguments[0]).stem}")
            assert script.parse([word.replace("=$", "=owner/") for word in arguments[1:]])
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def understood(arguments: list[str]) -> None:
    """Parse a command line of ours; a config that it names is loaded with its overrides."""
    command = GROUP.commands[arguments[0]]  # type: ignore[attr-defined]
    given = command.make_context(arguments[0], list(arguments[1:])).params
    config = given.get("config")
    if config is not None and config.suffix == ".toml" and config.parts[0] == "examples":
        configfile.load(ROOT / config, given["overrides"] or ())
    if isinstance(given.get("preset"), str):
        from sdxl_trainer import presets

        presets.read(given["preset"])


@pytest.mark.parametrize(("page", "text"), cases(lambda page: blocks(page, "toml")))
def test_configs_are_valid(page: Path, text: str) -> None:
    """Parts of a config are valid in a whole one: of a fine-tune, of an adapter, or beside another data set."""
    tree = tomllib.loads(text)
    whole = {**WHOLE, **tree, "train": {**WHOLE["train"], **tree.get("train", {})}}
    refused = []
    for more in ({}, {"adapter": {}}, {"data": [*WHOLE["data"], *whole["data"]]}):
        try:
            configfile.validated({**whole, **more}, name(page))
        except UserError as error:
            refused.append(error)
    assert len(refused) < 3, str(refused[0])


WHOLE: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "base"},
    "data": [{"path": "pictures"}],
    "train": {"steps": 1},
}


@pytest.mark.parametrize(("page", "text"), cases(lambda page: blocks(page, "python")))
def test_python_compiles_and_imports_what_there_is(page: Path, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sdxl_trainer"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for plain, picture in LINK.findall(text):
        target, _, anchor = (plain or picture).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


SECTIONS = "|".join(section for section, field in Config.model_fields.items() if configfile._section_class(field))
OPTION = re.compile(rf"`((?:{SECTIONS})\.[a-z_]+(?![\w.]))(?: = [^`]*)?`")
FILES = {"py", "toml", "json", "jsonl", "safetensors", "html", "md"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    known = {
        f"{section}.{option}"
        for section, field in Config.model_fields.items()
        if (part := configfile._section_class(field))
        for option in part.model_fields
    }
    text = page.read_text(encoding="utf-8")
    if page.name == "coming-from.md":  # the other columns are options of other programs
        text = "\n".join(line.rstrip("| ").rpartition(" | ")[2] for line in text.splitlines())
    named = {option for option in OPTION.findall(text) if option.rpartition(".")[2] not in FILES}
    assert not {option for option in named - known if not is_code(option)}


def is_code(dotted: str) -> bool:
    """Pages also name functions: `train.train_step`."""
    module, _, attribute = dotted.partition(".")
    try:
        return hasattr(importlib.import_module(f"sdxl_trainer.{module}"), attribute)
    except ImportError:
        return False
