"""Reading and writing configs: TOML files, dotted overrides, error messages, JSON Schema."""

import json
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from sdxl_trainer import presets, refusals
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError, closest, shortened, shown

# What is in the configs of other trainers, and how their files are called.
_OTHERS = {"pretrained_model_name_or_path", "network_module", "datasets", "training_method", "model_family"}
_OTHER_KINDS = {".json", ".yaml", ".yml", ".sh", ".bat"}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML file with `section.key=value` overrides (values as in TOML; bare words are strings)."""
    if path.is_dir():
        raise UserError(f"'{path}' is a folder", str(path), "give the path of a TOML file")
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        there = f"; there are: {shortened(found)}" if found else ""
        raise UserError(f"there is no config file '{path}'", str(path.parent), f"give the path of a TOML file{there}")
    if path.suffix.lower() in _OTHER_KINDS:
        raise _of_others(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error}", str(path), "save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not valid TOML: {error}", str(path), "correct the line; strings need quotes") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path), "make the file readable") from None
    if _OTHERS & {key for section in (tree, *tree.values()) if isinstance(section, dict) for key in section}:
        raise _of_others(path)
    for text in overrides:
        override(tree, text)
    return validated(tree, str(path), {text.partition("=")[0].strip() for text in overrides})


def _of_others(path: Path) -> UserError:
    what = (
        "this is no config of ours; kohya's, OneTrainer's, SimpleTuner's, ai-toolkit's and diffusers' can be converted"
    )
    return UserError(what, str(path), f"sdxl convert {path} ours.toml")


def validated(tree: dict[str, Any], where: str, overridden: Collection[str] = ()) -> Config:
    """A checked config from plain data; `where` names its origin in messages, but for options that the command line has
    `overridden`."""
    whole = presets.under(tree, where)
    config = _parsed(whole, where, overridden)
    # A preset is written for no file in particular: what of it does nothing beside the file's own is left out.
    idle = [option for option, _ in refusals.inert(config) if not refusals.is_default(config, option)]
    unasked = [option for option in idle if not _given(tree, option)]
    for option in unasked:
        put(whole, option, None)
    config = _parsed(whole, where) if unasked else config
    refusals.refuse(config, where)
    return config


def _parsed(tree: dict[str, Any], where: str, overridden: Collection[str] = ()) -> Config:
    try:
        # Through JSON, since strict types there allow a list where the config holds a tuple.
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise _user_error(error, where, overridden) from None


def _given(tree: dict[str, Any], option: str) -> bool:
    section, name = option.split(".")
    return name in tree.get(section, {})


def dumps(config: Config) -> str:
    """The resolved config as TOML: every value that is set or defaulted, in the order of the schema."""
    return written(config.model_dump(mode="json", exclude_none=True))


def written(tree: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> str:
    """A config's plain data as TOML; `notes` are comments behind the options that they name (train.steps)."""
    head: list[str] = []
    sections: list[str] = []
    for name in [name for name in Config.model_fields if name in tree]:
        value = tree[name]
        if isinstance(value, dict):
            sections += ["", f"[{name}]", *_lines(value, f"{name}.", notes or {})]
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                sections += ["", f"[[{name}]]", *_lines(entry, f"{name}.{index}.", notes or {})]
        else:
            head += _lines({name: value}, "", notes or {})
    return "\n".join(head + sections) + "\n"


def schema() -> str:
    """JSON Schema of the config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=1) + "\n"


def options_table() -> str:
    """All options with their defaults and meanings, as Markdown tables."""
    lines: list[str] = []
    top = [(name, field) for name, field in Config.model_fields.items() if not _section_class(field)]
    lines += ["### Top of the file", "", *_rows(top)]
    for name, field in Config.model_fields.items():
        section = _section_class(field)
        if section:
            heading = f"[[{name}]]" if get_origin(field.annotation) is tuple else f"[{name}]"
            lines += ["", f"### {heading}", "", *_rows(list(section.model_fields.items()))]
            for inner, nested in section.model_fields.items():
                within = _section_class(nested)
                if within:
                    lines += ["", f"### [{name}.{inner}]", "", *_rows(list(within.model_fields.items()))]
    return "\n".join(lines) + "\n"


def _section_class(field: Any) -> type[BaseModel] | None:
    candidates = [field.annotation, *get_args(field.annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _rows(fields: list[tuple[str, Any]]) -> list[str]:
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for name, field in fields:
        default = (
            "required" if field.is_required() else "" if field.default is None else f"`{_toml(_plain(field.default))}`"
        )
        values = [a for a in get_args(field.annotation) if isinstance(a, str)]
        allowed = f" ({', '.join(f'`{value}`' for value in values)})" if values else ""
        rows.append(f"| `{name}` | {default} | {field.description}{allowed} |")
    return rows


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _lines(section: Mapping[str, Any], place: str, notes: Mapping[str, str]) -> list[str]:
    model = _section_class(Config.model_fields[place.partition(".")[0]]) if place else None
    order = list(model.model_fields if model else section)
    section = {key: section[key] for key in sorted(section, key=lambda key: order.index(key) if key in order else -1)}
    noted = {key: f"  # {notes[place + key]}" if place + key in notes else "" for key in section}
    return [f"{key} = {_toml(value)}{noted[key]}" for key, value in section.items()]


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    # JSON's strings, numbers and booleans are TOML's, but for the escape of DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def override(tree: dict[str, Any], text: str) -> None:
    """Change plain data by `section.key=value`."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{text}' is not an override", "command line", "write section.key=value, e.g. train.steps=20")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    put(tree, key.strip(), value)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Give `section.key` or `section.0.key` a value; None takes it away, so that it has its default."""
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        raise UserError(
            f"'{key}' names a list", "command line", "name an entry by its number, e.g. data.0.resolution=512"
        )
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of plain data by the names that `put` takes: section.key, section.0.key in a list of sections."""
    if isinstance(tree, dict):
        pairs = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree and all(isinstance(entry, dict) for entry in tree):
        pairs = [(str(index), entry) for index, entry in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for key, part in pairs for k, v in flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _child(node: Any, part: str, text: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise UserError(f"'{part}' in '{text}' is not an entry", "command line", f"entries: 0 to {len(node) - 1}")
        return node[int(part)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise UserError(f"'{part}' in '{text}' is a value, not a section", "command line", "write section.key=value")
    return child


# Keys that a copied config.json has and that are not the user's to choose.
_DERIVED = {
    f"model.unet.{name}": "remove it: it follows from the text encoders"
    for name in ("cross_attention_dim", "projection_class_embeddings_input_dim")
}


def _user_error(error: ValidationError, where: str, overridden: Collection[str]) -> UserError:
    # A list whose entries are wrong is said to be empty too. An unknown key comes first: it may be what is missing.
    found = [e for e in error.errors(include_url=False) if e["type"] != "too_short" or not e["input"]]
    first = min(found, key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    others = len(found) - 1
    more = f" ({others} more {'problem' if others == 1 else 'problems'} after this one)" if others else ""
    unknown = first["type"] == "extra_forbidden"
    here = {option for option in overridden if f"{key}.".startswith(f"{option}.")}
    made = unknown or first["type"].endswith("_type")  # what `put` made a section of, to hold the option
    above = {option for option in overridden if made and option.startswith(f"{key}.")}
    where = "command line" if here or above else where
    if unknown:
        name, fields = str(first["loc"][-1]), _fields(first["loc"][:-1])
        return UserError(f"unknown key '{key}'{more}", where, _DERIVED.get(key) or closest(name, fields))
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        parent = key.rpartition(".")[0]
        return UserError(
            f"'{parent}' has too few values{more}", where, f"give every value of {parent}: see docs/config.md"
        )
    if first["type"] == "missing":
        return UserError(f"'{key}' is missing{more}", where, f"add {first['loc'][-1]} = ... {_section(first['loc'])}")
    what = f"{key} = {shown(first['input'])} is not allowed{more}"
    return UserError(what, where, _fix(first))


# What kinds of values are called.
_TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text, in quotes",
}


def _fix(error: Any) -> str:
    """What a value should be."""
    kind, given, name = error["type"], error["input"], error["loc"][-1]
    if kind == "literal_error" and isinstance(given, str):
        options = error["ctx"]["expected"].replace("' or '", "', '").strip("'").split("', '")
        allowed, near = f"allowed: {', '.join(options)}", closest(given, options)
        return allowed if near.startswith("allowed") else f"{near} ({allowed})"
    if kind == "multiple_of":
        step = error["ctx"]["multiple_of"]
        below = given // step * step
        return f"it should be a multiple of {step}: {below} or {below + step}"
    if kind == "too_short":
        return f"give at least {error['ctx']['min_length']} [[{name}]]"
    if kind == "model_type":
        section = ".".join(str(part) for part in error["loc"])
        return f"it should be a section: [{section}], then its options, one per line"
    if kind == "tuple_type" and name in {"data", "learn", "token"}:
        return f"it should be a list of sections: write [[{name}]] above each"
    if kind == "tuple_type" and not isinstance(given, dict):
        return f"it should be a list: [{shown(given)}]"
    allowed = _TYPES.get(kind) or error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"it should be {allowed}"


def _section(location: tuple[Any, ...]) -> str:
    parents = [part for part in location[:-1] if isinstance(part, str)]
    if not parents:
        return "at the top of the file"
    return f"under [[{parents[0]}]]" if parents[0] in {"data", "learn", "token"} else f"under [{parents[0]}]"


def _fields(location: Iterable[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
