"""The base model on disk: a diffusers folder, wherever it came from. No weights are loaded here."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sdxl_trainer import files, untrained
from sdxl_trainer.config import Model
from sdxl_trainer.data.cache import key
from sdxl_trainer.data.memo import Memo
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import ADAPTER_FILE, header
from sdxl_trainer.formats import folder as layout

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PIPELINE = "StableDiffusionXLPipeline"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# What is read of the text encoders' configs at once, with the most that is believed.
_SIZES = {"num_hidden_layers": 1000, "hidden_size": 100_000}
_WEIGHTLESS = ("tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class Base:
    """Folders of the base's parts. `vae` differs from `folder / "vae"` when another VAE was asked for; `unet` is the
    config of a UNet that begins with random weights."""

    folder: Path
    vae: Path
    variant: str | None
    unet: dict[str, Any] | None = None

    def part(self, name: str) -> Path:
        return self.vae if name == "vae" else self.folder / name

    def config(self, part: str) -> dict[str, Any]:
        """The JSON config of a part; of the whole for part "model_index"."""
        if part == "unet" and self.unet is not None:
            return dict(self.unet)
        if part not in self._configs:
            names = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
            self._configs[part] = _read(self.folder / names[part] if part in names else self.part(part) / "config.json")
        return dict(self._configs[part])

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _files(self) -> dict[str, dict[str, tuple[str, int]]]:
        """The files of each part and of the whole, as `_stamps` gives them."""
        whole = os.path.realpath(self.folder)
        found = {"": _stamps(whole)}
        for part in PARTS:
            path = self.part(part)
            elsewhere = part == "vae" or path.is_symlink()
            found[part] = _stamps(os.path.realpath(path) if elsewhere else f"{whole}/{part}")
        return found

    @property
    def refines(self) -> bool:
        """Whether it is SDXL's refiner: one text encoder, and an aesthetic score in place of the target size."""
        return self.config("model_index").get("text_encoder", True) in (None, [None, None])

    @property
    def inpaints(self) -> bool:
        """Whether its UNet takes a mask and the masked picture beside the noisy latents."""
        return self.config("unet").get("in_channels", 4) == 9

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the folders that make up the model."""
        return tuple(p for p in PARTS if not (self.refines and p in {"text_encoder", "tokenizer"}))

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(p for p in self.parts if p.startswith("text_encoder"))

    def zeros_for_empty(self) -> bool:
        """Whether the pipeline's unconditional embeddings are zeros, and not those of the empty caption."""
        return bool(self.config("model_index").get("force_zeros_for_empty_prompt", True))

    def mark(self) -> str:
        """What tells one UNet from another."""
        return key(*[files.sampled(p) for p in sorted(self.part("unet").glob("*.safetensors"))])

    def hash(self, part: str, memo: Memo) -> str:
        """SHA-256 over a part's files: two models that encode alike have one hash."""
        kinds, whole = (".safetensors", ".json", ".txt"), sorted(self._files[part].items())
        hashed = [(name, stamp) for name, (stamp, _) in whole if name.endswith(kinds)]
        return key(*[[name, _file_hash(self.part(part) / name, stamp, memo)] for name, stamp in hashed])


def resolve(options: Model, cache: Path, memo: Memo | None = None) -> Base:
    """Find, download or unpack the base, and check that every part is there and whole. With `memo` files that were
    checked are not opened again while they stay as they are."""
    folder = _folder(options, cache)
    if not (folder / "model_index.json").is_file():
        listed = shortened(sorted(p.name for p in folder.iterdir())) or "nothing"
        fix = "give a folder written by save_pretrained, a hub id, or a .safetensors file"
        if (folder / ADAPTER_FILE).is_file():
            fix = "this is an adapter: give the base it was made for, and this as adapter.start, or to draw as --lora"
        raise UserError(f"there is no diffusers model here (no model_index.json; found: {listed})", str(folder), fix)
    vae = _vae_folder(options) if options.vae else folder / "vae"
    base = Base(folder, vae, options.variant)
    random = options.init == "random"
    began, checked = time.time_ns(), f"configs {key(options.model_dump(mode='json'), base._files)}"
    known = memo.known.get(checked) if memo is not None else None
    base._configs.update(known or {})
    for part in () if known else base.parts:
        if part != "unet" or not random:
            _check_part(base, part)
    if random:
        base = replace(base, unet=_untrained(base, options))
    if not known:
        _check_fit(base)
    newest = max(changed for part in base._files.values() for _, changed in part.values())
    if memo is not None and not known and newest < began - files.COARSE:
        memo.remember(checked, base._configs)
    return base


def _untrained(base: Base, options: Model) -> dict[str, Any]:
    """The config of a UNet from random weights: that of the base, or of SDXL where the base has none, with the sizes
    that are asked for and the widths that the text encoders need."""
    own = base.config("unet") if (base.part("unet") / "config.json").is_file() else layout.read_config("unet")
    made = untrained.resized(own, options.unet)
    return made | _given(base, made)


def weights_file(base: Base, part: str) -> str | None:
    """The variant to load a part with: the wanted one where the part has it, as diffusers does for a VAE override."""
    has_variant = base.variant and list(base.part(part).glob(f"*.{base.variant}*.safetensors"))
    return base.variant if has_variant else None


def _folder(options: Model, cache: Path) -> Path:
    path = Path(options.path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        from sdxl_trainer.formats import single_file

        stat = path.stat()
        target = cache / f"base-{key(str(path.resolve()), stat.st_size, stat.st_mtime_ns, options.configs)[:16]}"
        if not target.is_dir():
            configs = Path(options.configs).expanduser() if options.configs else None
            files.write_atomically(target, lambda temporary: single_file.expand(path, temporary, configs))
        return target
    unread = ["unet/*.safetensors"] if options.init == "random" else []
    return _from_hub(options.path, options.revision, "model.path", unread)


def _vae_folder(options: Model) -> Path:
    assert options.vae is not None
    path = Path(options.vae).expanduser()
    if path.is_file():
        raise UserError(f"'{path}' is a file", "model.vae", "give a diffusers folder or a hub id")
    folder = path if path.is_dir() else _from_hub(options.vae, options.vae_revision, "model.vae")
    found = next((place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None)
    if found is None:
        fix = "give a folder or hub id with the config.json of a VAE, or remove model.vae to use the model's own"
        raise UserError(f"there is no VAE in '{options.vae}'", "model.vae", fix)
    return found


def _from_hub(name: str, revision: str | None, where: str, unread: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"'{name}' does not exist", where, "give an existing folder or .safetensors file, or a hub id")
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors", "README.md"]
    # Single-file checkpoints at the root of a repository would double the download.
    ignored = ["sd_xl*.safetensors", "*lora*", "*onnx*", "*openvino*", "*flax*", *unread]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError:
        raise UserError(
            f"'{name}' is gated", where, "accept its terms on its page, then log in: hf auth login"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        wanted = f"revision {revision} of '{name}'" if revision else f"'{name}'"
        what = f"the hub has no {wanted} ({type(error).__name__})"
        raise UserError(what, where, "check the spelling; a private repository needs: hf auth login") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"'{name}' is neither a local folder nor can it be fetched from the hub ({type(error).__name__})"
        fix = "check the path or the network, unset HF_HUB_OFFLINE if it is set, or download the model first"
        raise UserError(what, where, fix) from None


def _check_part(base: Base, part: str) -> None:
    folder = base.part(part)
    if not folder.is_dir():
        kind = base.config("model_index").get("_class_name", PIPELINE)
        other = "" if kind == PIPELINE else f": it is a {kind}"
        what = f"the model has no '{part}'{other}"
        raise UserError(what, str(folder), "use a complete SDXL base model (all seven parts)")
    name = {"scheduler": "scheduler_config.json", "tokenizer": None, "tokenizer_2": None}.get(part, "config.json")
    if name and not (folder / name).is_file():
        raise UserError(f"'{part}' has no {name}", str(folder), "copy the model again: a file is missing")
    if part not in _WEIGHTLESS and not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".ckpt", ".pt", ".pth"})
        what = f"'{part}' has no .safetensors weights" + (f", only the pickle {pickles[0]}" if pickles else "")
        fix = "pickles can run code and are not opened: convert it with diffusers' save_pretrained"
        raise UserError(what, str(folder), fix if pickles else "copy the model again: the weights are missing")
    if part.startswith("tokenizer") and not _has_vocabulary(folder):
        what = f"'{part}' has no vocabulary: neither tokenizer.json nor vocab.json with merges.txt"
        raise UserError(what, str(folder), "copy the model again: a file is missing")
    for path in sorted(folder.glob("*.safetensors")):
        header.read(path, "copy or download this file again")
    for path in sorted(folder.glob("*.safetensors.index*.json")):
        _check_shards(path)


def _has_vocabulary(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in VOCABULARIES)


def _check_shards(index: Path) -> None:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("this file is not an index of weights", str(index), "copy the model again") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"files that this index names are missing: {shortened(missing)}", str(index), "copy them too")


def _check_fit(base: Base) -> None:
    """Do the parts' configs belong together, and to SDXL base?"""
    _check_sizes(base)
    unet, vae = base.config("unet"), base.config("vae")
    where, fix = str(base.part("unet")), "use SDXL base, its refiner or an inpainting model of it, not SD 1 or 2"
    if unet.get("in_channels", 4) not in {4, 9} or unet.get("addition_embed_type") != "text_time":
        kind = f"{unet.get('in_channels', 4)} input channels, {unet.get('addition_embed_type')} conditioning"
        raise UserError(f"this UNet is not that of SDXL ({kind})", where, fix)
    names = {"cross_attention_dim": "text", "projection_class_embeddings_input_dim": "conditioning"}
    for option, wanted in _given(base, unet).items():
        name, given = names[option], unet.get(option)
        if isinstance(given, int) and given != wanted:
            kind = "SDXL's refiner" if base.refines else "SDXL base"
            what = f"this UNet is not that of {kind}: it takes {name} of width {given}, and is given {wanted}"
            raise UserError(what, where, fix)
    kind, channels = vae.get("_class_name", "AutoencoderKL"), vae.get("latent_channels", 4)
    if kind != "AutoencoderKL" or channels != 4:
        what = f"this VAE is not one for SDXL: {kind} with {channels} latent channels"
        raise UserError(what, str(base.vae), "use an AutoencoderKL of SDXL, or remove model.vae to use the model's own")


def _check_sizes(base: Base) -> None:
    """Sizes of text encoders, of which much is made before their weights are looked at."""
    for part in base.encoders:
        config = base.config(part)
        for name, most in _SIZES.items():
            size = config.get(name)
            if type(size) is not int or not 1 <= size <= most:
                what = f"{name} = {json.dumps(size)[:40]} is not that of a text encoder"
                raise UserError(what, str(base.part(part) / "config.json"), "copy or download this part again")


def _given(base: Base, unet: dict[str, Any]) -> dict[str, int]:
    """Widths of what the text encoders give the UNet, by the names of its config; none if their configs are silent."""
    encoders = [base.config(part) for part in base.encoders]
    numbers = 5 if base.refines else 6
    try:
        conditioning = encoders[-1]["projection_dim"] + numbers * unet["addition_time_embed_dim"]
        context = sum(config["hidden_size"] for config in encoders)
    except (KeyError, TypeError):
        return {}
    return {"cross_attention_dim": context, "projection_class_embeddings_input_dim": conditioning}


def _read(path: Path) -> dict[str, Any]:
    """A config."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", str(path), "make it readable") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError("this file is not valid JSON of a config", str(path), "copy the model again")
    return found


def _stamps(folder: str) -> dict[str, tuple[str, int]]:
    """The files in a folder that is no link, none where there is no folder: a text that changes with each, by which its
    hash is known, and when it last changed, in nanoseconds since 1970."""
    found: dict[str, tuple[str, int]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    path, status = os.path.realpath(entry.path) if entry.is_symlink() else entry.path, entry.stat()
                    found[entry.name] = f"{path}:{status.st_size}:{status.st_mtime_ns}", status.st_ctime_ns
    except OSError:  # the check of the part says what is wrong
        pass
    return found


def _file_hash(path: Path, stamp: str, memo: Memo) -> str:
    known = memo.known.get(stamp)
    return known if isinstance(known, str) else memo.remember(stamp, files.sha256(path))
