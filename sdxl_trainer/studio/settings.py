"""A run's config file as a form: fields from the options' own schema, edits that are written to the TOML file."""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.container import Container

from sdxl_trainer import configfile, files, presets
from sdxl_trainer.config import OPTIMIZERS, Config
from sdxl_trainer.errors import UserError
from sdxl_trainer.studio.workspace import Workspace

# What most people set; all else is behind "more". An entry of a list stands under its number.
FIRST = (
    "model.path",
    "data.0.path",
    "data.0.resolution",
    "data.0.caption",
    "data.0.trigger",
    "train.steps",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "adapter.rank",
    "optimizer.name",
    "train.checkpoint_every",
    "train.validate_every",
    "validation.prompts",
)
# Options with other values than a list could hold, but with usual ones.
SUGGESTED = {"optimizer.name": list(OPTIMIZERS)}
SHARES = ["true", "false", "0.25", "0.5", "0.75"]  # of an option that is a switch or a share
LISTS = ("data", "token", "learn")
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@cache
def fields() -> list[dict[str, Any]]:
    """Every option: section, name, kind of value, default, meaning, choices and limits, as the schema says."""
    schema = Config.model_json_schema()
    found = []
    for name, part in schema["properties"].items():
        section = _section(schema, part)
        if section is None:
            found.append(_field("", name, part, name in schema.get("required", ())))
        else:
            required = section.get("required", ())
            found += [_field(name, key, value, key in required) for key, value in section["properties"].items()]
    return found


def _section(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any] | None:
    candidates = [part, part.get("items", {}), *part.get("anyOf", ())]
    named = next((c["$ref"] for c in candidates if "$ref" in c), None)
    return schema["$defs"][named.rpartition("/")[2]] if named else None


def _field(section: str, name: str, part: dict[str, Any], required: bool) -> dict[str, Any]:
    given = [c for c in part.get("anyOf", ()) if c.get("type") != "null"]
    kinds = {c.get("type") for c in given}
    plain: dict[str, Any] = {"enum": SHARES} if "boolean" in kinds and len(given) > 1 else (given or [part])[0]
    items = plain.get("items", {})
    simple = items.get("type") in {"string", "number", "integer"}
    kind = "steps" if kinds == {"integer", "string"} else plain.get("type", "object")
    if kind == "object" or (kind == "array" and not simple):
        kind = "json"
    return {
        "section": section,
        "name": name,
        "kind": kind,
        "items": items.get("type"),
        "list": section in LISTS,
        "required": required,
        "default": part.get("default"),
        "description": part.get("description", ""),
        "choices": plain.get("enum") or items.get("enum"),
        "suggestions": SUGGESTED.get(f"{section}.{name}"),
        "limits": {limit: plain[limit] for limit in LIMITS if limit in plain},
    }


def state(workspace: Workspace, name: str) -> dict[str, Any]:
    """A config as the page needs it: text, values, what is wrong with it, and what differs from how it began."""
    path = source(workspace, name)
    text = read(path)
    tree, config, problem = parsed(text, workspace.shown(path))
    origin = _origin(workspace, name)
    began = parsed(read(origin), "")[0] if origin.is_file() else {}
    rate = presets.effective_rate(config) if config else None
    return {
        "name": name,
        "toml": text,
        "tree": tree,
        "problem": problem,
        "changes": changes(began, tree) if began else [],
        "values": config.model_dump(mode="json") if config else None,
        "effective": f"{rate[0]:g} = {rate[1]}" if rate else None,
        "commands": [f"sdxl {verb} {workspace.shown(path)}" for verb in ("check", "train")],
    }


def source(workspace: Workspace, name: object) -> Path:
    """A run's config file: `runs/NAME.toml`, or what a run that began without one has written."""
    path, written = workspace.config(name), workspace.run(name) / "config.toml"
    return written if written.is_file() and not path.is_file() else path


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"there is no config that can be read: {error}", path.name, "choose one of the list") from None


def parsed(text: str, where: str) -> tuple[dict[str, Any], Config | None, dict[str, str] | None]:
    """The values of a config's text, all options, and what `sdxl train` would say against them before it looks at
    data."""
    tree: dict[str, Any] = {}
    try:
        tree = tomllib.loads(text)
        return tree, configfile.validated(tree, where), None
    except tomllib.TOMLDecodeError as error:
        return tree, None, {"what": f"not valid TOML: {error}", "where": where, "fix": "correct the line"}
    except UserError as error:
        return tree, None, {"what": error.what, "where": error.where, "fix": error.fix}


def create(
    workspace: Workspace, name: object, tree: dict[str, Any], notes: Mapping[str, str] | None = None, head: str = ""
) -> str:
    """A new config file, `head` above it. UserError if there is one, or a run, of that name."""
    path, run = workspace.config(name), workspace.run(name)
    if path.exists() or run.exists():
        raise UserError(f"there is a run '{path.stem}' already", "name", "choose another name, or continue that one")
    text = head + configfile.written({**tree, "output_dir": workspace.shown(run)}, notes)
    files.write_text(_origin(workspace, path.stem), text)
    files.write_text(path, text)
    return path.stem


def copy(workspace: Workspace, other: object, name: object) -> str:
    """A new config with the values of another run's: its file, or the one in its folder."""
    path = source(workspace, other)
    text = read(path)
    try:
        return create(workspace, name, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not valid TOML: {error}", path.name, "correct the line") from None


def write(workspace: Workspace, name: str, text: str) -> None:
    """Save a config's text, also one with values that are not allowed yet; not one that is no TOML."""
    path = workspace.config(name)
    read(source(workspace, name))
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not valid TOML: {error}", path.name, "correct the line; strings need quotes") from None
    files.write_text(path, text)


def set_values(workspace: Workspace, name: str, changes: Mapping[str, Any]) -> None:
    """Give options values, or with None their defaults again. All else in the file stays as it is, comments too, except
    notes that say why a preset chose a value which is changed."""
    path = source(workspace, name)
    try:
        document = tomlkit.parse(read(path))
    except tomlkit.exceptions.TOMLKitError as error:
        raise UserError(f"not valid TOML: {error}", path.name, "correct the line in the text below first") from None
    origin = _origin(workspace, name)
    began = tomlkit.parse(read(origin)) if origin.is_file() else tomlkit.document()
    for key, value in changes.items():
        if value is not None and key.split(".")[0] not in Config.model_fields:
            raise UserError(f"there is no option '{key[:80]}'", "settings", "choose one of the list")
        written, chosen = _trivia(document, key), _trivia(began, key)
        stale = written is not None and chosen is not None and written.comment == chosen.comment
        configfile.put(document, key, value)
        if stale and (kept := _trivia(document, key)):
            kept.comment = kept.comment_ws = ""
    write(workspace, name, tomlkit.dumps(document))


def _trivia(document: tomlkit.TOMLDocument, key: str) -> Any:
    """The comment behind an option and the space before it; none where the option is not written."""
    node: Any = document
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
    container = node if isinstance(node, Container) else getattr(node, "value", None)
    if not isinstance(container, Container) or last not in container:
        return None
    return getattr(container.item(last), "trivia", None)


def _origin(workspace: Workspace, name: str) -> Path:
    return workspace.state / "origins" / f"{name}.toml"


def changes(began: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """What differs between two configs, by option."""
    old, new = configfile.flat(began), configfile.flat(now)
    keys = [*old, *(key for key in new if key not in old)]
    return [{"key": k, "was": old.get(k), "is": new.get(k)} for k in keys if old.get(k) != new.get(k)]
