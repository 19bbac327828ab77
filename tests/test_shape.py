"""The shape of the code: budgets, import directions, options that are read, documents that are true."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from sdxl_trainer import cli, configfile, reference
from sdxl_trainer.config import Config

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p
    for folder in ("sdxl_trainer", "toyworld", "recipes", "scripts", "tests", "benchmarks")
    for p in (ROOT / folder).rglob("*.py")
)

# Lower layers first: a module imports only from its own layer and from those above it in this list.
LAYERS = [
    [
        "errors",
        "files",
        "addresses",
        "lock",
        "wishes",
        "sharding",
        "keyed",
        "config",
        "chunking",
        "threads",
        "cpus",
        "dtypes",
    ],
    [
        "schedule",
        "noise",
        "timesteps",
        "objective",
        "presets",
        "configfile",
        "refusals",
        "guards",
        "log",
        "trackers",
        "formats",
        "report",
        "blueprint",
        "kernels",
        "unet",
        "untrained",
        "data.records",
        "data.options",
        "data.buckets",
        "data.geometry",
        "data.images",
        "data.sources",
        "data.plan",
        "data.table",
        "data.cache",
        "data.places",
        "data.upkeep",
        "data.masks",
        "data.problems",
        "data.memo",
        "data.mirrored",
        "data.pictures",
        "data.captions",
    ],
    ["base", "vae", "clip", "text", "model", "parameters", "optim", "ema", "data.encode", "convert"],
    ["adapters", "tokens", "narrow", "memory"],
    ["adapter_files"],
    ["attach"],
    ["beginning"],
    [
        "data.words",
        "data.loader",
        "data.holes",
        "data.prepare",
        "data.ledger",
        "data.findings",
        "data.survey",
        "data.picture_findings",
    ],
    ["pace"],
    ["overview"],
    ["distributed", "sample", "sampling", "checkpoint", "prior"],
    ["class_pictures", "mirror"],
    ["private"],
    ["validate", "hub", "publish", "saver"],
    ["run"],
    ["manifest", "resume"],
    ["export"],
    ["kinds", "setup", "finish", "held_out", "disk"],
    ["train", "check", "inspect_cache", "from_folder"],
    ["compat", "arrivals"],
    ["demo", "studio", "notebook", "reference"],
    ["cli"],
]
# Heavy libraries and the only modules that may import them.
DOORS = {
    "accelerate": {"trackers", "distributed", "setup", "run", "validate"},
    "datasets": {"data.sources"},
    "peft": {"adapters", "attach", "beginning"},
    "bitsandbytes": {"optim", "narrow"},
    "wandb": set(),
    "typer": {"cli"},
    "starlette": {"studio"},
    "uvicorn": {"studio"},
    "argparse": {"compat"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "sdxl_trainer").with_suffix("").parts).removesuffix(".__init__")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if any(name == n or name.startswith(n + ".") for n in names))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "a file has at most 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines, at most 60 are allowed"
        if isinstance(node, ast.ExceptHandler):
            assert getattr(node.type, "id", "named") not in {"Exception", "BaseException"}
            assert node.type is not None
    unfinished = [word for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X", "Not" + "ImplementedError(") if word in text]
    assert not unfinished


PACKAGE = [p for p in SOURCES if p.is_relative_to(ROOT / "sdxl_trainer") and p.name != "__main__.py"]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: module_name(p) or "package")
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    if name in {"__init__", "", "data"}:
        return
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in DOORS:
            assert any(name == door or name.startswith(door + ".") for door in DOORS[top]), f"{name} imports {imported}"
        target = imported.removeprefix("sdxl_trainer.")
        known = any(target == n or target.startswith(n + ".") for names in LAYERS for n in names)
        if imported.startswith("sdxl_trainer.") and known:
            assert layer(target) <= layer(name), f"{name} imports {imported} from a higher layer"


def test_every_option_is_read_somewhere() -> None:
    """An option that nobody reads would be one without effect."""
    code = "\n".join(
        p.read_text(encoding="utf-8") for p in PACKAGE if p.parent.name != "config" and p.name != "configfile.py"
    )
    for name, field in Config.model_fields.items():
        sections = [
            a for a in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(a, "model_fields")
        ]
        for option in sections[0].model_fields if sections else [name]:
            assert re.search(rf"\.{option}\b", code), f"nothing reads {name}.{option}"


def test_the_schema_in_the_docs_is_the_config_s() -> None:
    assert (ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8") == configfile.schema()


def test_the_table_of_options_in_the_docs_is_the_config_s() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert configfile.options_table() in text, "run: sdxl schema --table"


def test_the_reference_of_the_commands_in_the_docs_is_that_of_the_commands() -> None:
    made = reference.commands(typer.main.get_command(cli.app))
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == made, "run: make schema"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_examples_are_valid_configs(path: Path) -> None:
    assert configfile.load(path)


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import json, sys; sys.argv = ['sdxl', '--help']\n"
        "from sdxl_trainer.cli import app\n"
        "try:\n app()\nexcept SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(out.strip().splitlines()[-1]))
    assert not loaded & {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "datasets", "pydantic"}


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sdxl", "--version"])
    assert cli.guarded(cli.command) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert capsys.readouterr().out == f"{project['name']} {project['version']}\n"


def test_the_training_step_fits_on_a_screen() -> None:
    tree = ast.parse((ROOT / "sdxl_trainer" / "train.py").read_text(encoding="utf-8"))
    step = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "train_step")
    assert step.end_lineno - step.lineno < 60
