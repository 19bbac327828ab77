"""How inputs are made hostile or broken: configs, metadata, pictures, checkpoints, weights, models, the cache."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.config import Config

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    "",
    "\0",
    "../../up",
    "/etc/passwd",
    "~nobody/x",
    [],
    [[]],
    {},
]
ODD += [
    "<script>alert(1)</script>",
    "\x1b[31m",
    "a" * 100_000,
    "\ud800",
    [None],
    {"a": {"a": {}}},
    "s3://x",
    "file:///etc",
]


def toml(data: dict[str, Any]) -> str:
    head, sections = [], []
    for name, value in data.items():
        entries = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        if isinstance(entries[0], dict):
            title = f"[{name}]" if entries is not value else f"[[{name}]]"
            for entry in entries:
                sections += [title, *(f"{key} = {literal(inner)}" for key, inner in entry.items())]
        else:
            head.append(f"{name} = {literal(value)}")
    return "\n".join([*head, *sections]) + "\n"


def literal(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return json.dumps(value)


def broken(draw: random.Random, content: bytes) -> bytes:
    """Bytes changed, cut, doubled or put in the place of others."""
    made = bytearray(content)
    how = draw.randrange(5)
    if how == 0 and made:
        for _ in range(draw.choice([1, 1, 8, 64])):
            made[draw.randrange(len(made))] = draw.randrange(256)
    elif how == 1:
        del made[draw.randrange(len(made) + 1) :]
    elif how == 2:
        made[:16] = draw.randbytes(16)
    elif how == 3:
        at = draw.randrange(len(made) + 1)
        made[at:at] = made[: draw.randrange(1 << 12)]
    else:
        made = bytearray(draw.randbytes(draw.choice([0, 1, 7, 8, 9, 100, 5000])))
    return bytes(made)


def odd_config(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    for _ in range(draw.choice([1, 1, 2, 3])):
        section = draw.choice(list(Config.model_fields))
        kinds = [a for a in _members(Config.model_fields[section].annotation) if hasattr(a, "model_fields")]
        if not kinds:
            options[section] = draw.choice(ODD)
            continue
        name, value = draw.choice(list(kinds[0].model_fields)), draw.choice(ODD)
        node = options.setdefault(section, [{}] if section in {"data", "learn", "token"} else {})
        (node[0] if isinstance(node, list) else node)[name] = value
    options["output_dir"] = "run"


def _members(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(deep for a in inner for deep in _members(a))]


def broken_config(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    content = broken(draw, toml(options).encode()).replace(b"output_dir", b"output_dir")
    (place / "config.toml").write_bytes(content)


def odd_metadata(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    path = place / "pictures" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if draw.random() < 0.4:
        path.write_bytes(broken(draw, path.read_bytes()))
        return
    for _ in range(draw.choice([1, 2, 5])):
        row = draw.choice(rows)
        row[draw.choice(["file_name", "text", "text", "weight", "mask", "repeats", "\0"])] = draw.choice(ODD)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def broken_picture(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    path = draw.choice(sorted((place / "pictures").glob("*.png")))
    how = draw.randrange(4)
    if how == 0:  # a header that promises more than any memory holds
        content = bytearray(path.read_bytes())
        content[16:24] = draw.choice([2**31 - 1, 60_000, 200_000]).to_bytes(4, "big") * 2
        path.write_bytes(content)
    elif how == 1:
        path.unlink()
        path.symlink_to(draw.choice(["/dev/zero", "/etc/passwd", path.name, "..", "/proc/self/mem"]))
    else:
        path.write_bytes(broken(draw, path.read_bytes()))


def broken_checkpoint(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    folder = place / "run" / "checkpoint-2"
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    path.write_bytes(broken(draw, path.read_bytes()))
    if draw.random() < 0.5:
        _sealed(folder)


def odd_checkpoint(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    """A checkpoint whose hashes are right, and which was made to do harm."""
    folder = place / "run" / "checkpoint-2"
    how = draw.randrange(3)
    if how == 0:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        state[draw.choice(list(state))] = draw.choice(ODD)
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    elif how == 1:
        _odd_header(draw, folder / draw.choice(["optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"]))
    else:
        (folder / "manifest.json").write_text(json.dumps({"files": draw.choice([*ODD, {"../../../etc/passwd": "x"}])}))
        return
    _sealed(folder)


def _sealed(folder: Path) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    files.write_json(folder / "manifest.json", {"files": files.tree_hashes(folder)})


def _odd_header(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    names = [name for name in entries if name != "__metadata__"]
    entry = entries[draw.choice(names)]
    key = draw.choice(["dtype", "shape", "data_offsets", "name"])
    if key == "name":
        entries[draw.choice(["", "../x", "a" * 10_000, "\0"])] = entries.pop(draw.choice(names))
    else:
        entry[key] = draw.choice([*ODD, [2**40, 2**40], [-1, 5], "F99", [0, 2**62]])
    header = json.dumps(entries).encode()
    size = draw.choice([len(header)] * 6 + [0, 2**63, 2**32])
    path.write_bytes(size.to_bytes(8, "little") + header + content[8 + length :])


def odd_weights(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    path = draw.choice(sorted((place / "base").rglob("*.safetensors")))
    if draw.random() < 0.6:
        _odd_header(draw, path)
    else:
        path.write_bytes(broken(draw, path.read_bytes()))


def odd_model(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    path = draw.choice(sorted(p for p in (place / "base").rglob("*") if p.suffix in {".json", ".txt"}))
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:
        config = None
    if isinstance(config, dict) and draw.random() < 0.7:
        extra = {"auto_map": {"AutoModel": "evil.Model"}, "_class_name": "EvilModel", "architectures": ["Evil"]}
        key = draw.choice([*config, *extra])
        config[key] = extra.get(key, draw.choice([*ODD, 10**6, [10**6]]))
        path.write_text(json.dumps(config), encoding="utf-8")
    elif draw.random() < 0.3:
        weights = draw.choice(sorted((place / "base").rglob("*.safetensors")))
        weights.with_suffix(".bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.")
        weights.unlink()
    else:
        path.write_bytes(broken(draw, path.read_bytes()))


def broken_cache(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    path = draw.choice(sorted((place / "cache").rglob("*.*")))
    if path.suffix == ".safetensors" and draw.random() < 0.4:
        _odd_header(draw, path)
    else:
        path.write_bytes(broken(draw, path.read_bytes()))


def broken_records(draw: random.Random, place: Path, options: dict[str, Any]) -> None:
    path = place / "run" / draw.choice(["manifest.json", "metrics.jsonl", "config.toml", ".lock"])
    path.write_bytes(broken(draw, path.read_bytes() if path.exists() else b"{}"))


KINDS: list[tuple[str, Callable[[random.Random, Path, dict[str, Any]], None]]] = [
    ("config values", odd_config),
    ("config bytes", broken_config),
    ("metadata", odd_metadata),
    ("pictures", broken_picture),
    ("checkpoints, damaged", broken_checkpoint),
    ("checkpoints, forged", odd_checkpoint),
    ("weights", odd_weights),
    ("model folders", odd_model),
    ("cache", broken_cache),
    ("records", broken_records),
]
