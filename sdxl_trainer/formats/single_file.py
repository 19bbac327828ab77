"""One `.safetensors` file with a whole SDXL in the original (SGM) layout, as ComfyUI and A1111 read it."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import folder, modules, sgm, vocabulary
from sdxl_trainer.formats.header import PICKLED
from sdxl_trainer.formats.metadata import modelspec
from sdxl_trainer.schedule import is_edm

LOG = logging.getLogger(__name__)

Components = dict[str, dict[str, Tensor]]
Change = Callable[[Components], Components]  # gives components with some tensors replaced, perhaps by lazy ones

PARTS = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder 1 (CLIP-L)",
    "text_encoder_2": "text encoder 2 (OpenCLIP bigG)",
}
# Empty tensors whose presence tells ComfyUI and its kin how the model was trained.
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
# Tensors by which they know models with EDM's noise levels: Playground 2.5, CosXL.
EDM = ("edm_mean", "edm_vpred.sigma_max")
TO_SAFETENSORS = """convert it once, if you trust where it comes from: python -c "import sys, torch; \
from safetensors.torch import save_file; w = torch.load(sys.argv[1], weights_only=True); w = w.get('state_dict', w); \
save_file({k: v.clone() for k, v in w.items() if hasattr(v, 'shape')}, sys.argv[2])" OLD.ckpt NEW.safetensors"""


@dataclass(frozen=True)
class About:
    """What a file says of itself: its metadata, how it was trained, and the tensors that no component owns."""

    metadata: dict[str, str]
    v_prediction: bool
    zero_terminal_snr: bool
    unused: tuple[str, ...]


def about(path: Path | str) -> About:
    """Read the header alone. v-prediction is told by the marker tensor or by `modelspec.prediction_type`."""
    path = Path(path)
    with _opened(path) as file:
        names, metadata = set(file.keys()), dict(file.metadata() or {})
    for name in names.intersection(EDM):
        what = f"this model has EDM's noise levels (it holds '{name}'), which are not read from one file"
        raise UserError(what, str(path), "use the model's diffusers folder, whose scheduler says which")
    owned = tuple(sgm.PREFIX.values())
    unused = sorted(name for name in names - {V_PREDICTION, ZERO_TERMINAL_SNR} if not name.startswith(owned))
    return About(
        metadata,
        V_PREDICTION in names or metadata.get("modelspec.prediction_type") == "v",
        ZERO_TERMINAL_SNR in names,
        tuple(unused),
    )


_IS_ADAPTER = "this is an adapter: give the base it was made for, and this as adapter.start, or to draw as --lora"


def read(path: Path | str) -> Components:
    """The state dict of each component under its published diffusers names.

    The tensors are memory-mapped: nothing is read before it is used, and the file must stay where it is.
    """
    path = Path(path)
    with _opened(path) as file:
        names = list(file.keys())
        weights = {name: file.get_tensor(name) for name in names if name.startswith(tuple(sgm.PREFIX.values()))}
    components = {component: sgm.from_sgm(component, weights) for component in sgm.PREFIX}
    missing = [PARTS[component] for component, tensors in components.items() if not tensors]
    if missing:
        raise UserError(
            f"the file holds no {' and no '.join(missing)}; it begins with {shortened(sorted(names), 2) or 'nothing'}",
            str(path),
            _IS_ADAPTER
            if any("lora" in name or "lokr" in name or "hada" in name for name in names)
            else "use a full SDXL checkpoint (about 6.9 GB in half precision), or a diffusers folder",
        )
    return components


def expand(
    path: Path | str,
    target: Path | str,
    configs: Path | str | None = None,
    dtype: torch.dtype | None = None,
    change: Change = dict,
) -> Path:
    """Write a single file as a diffusers folder, with no hub: configurations and vocabulary are those shipped.

    `configs` names a diffusers folder to take both from instead, for a model of another size or vocabulary. The
    weights are checked against the configurations before anything is written; `change` may replace some of them.
    """
    target = Path(target)
    root = Path(configs) if configs is not None else folder.SHIPPED
    header, components = about(path), read(path)
    settings = {component: folder.read_config(component, root) for component in components}
    schedule = _schedule(folder.read_config("scheduler", root), header)
    for component, weights in components.items():
        modules.check(component, settings[component], weights, f"{path} with the configuration of {root}")
    if header.unused:
        names = shortened(header.unused, 3)
        LOG.warning("%s: %d tensors belong to no part of SDXL, left out: %s", path, len(header.unused), names)
    (target / folder.INDEX).unlink(missing_ok=True)
    for component, weights in change(components).items():
        folder.write_component(target, component, weights, settings[component], dtype)
    for name in folder.TOKENIZERS:
        if configs is None:
            vocabulary.write(target / name, vocabulary.clip_merges(), root / name)
        else:
            shutil.copytree(root / name, target / name, dirs_exist_ok=True)
    files.write_json(target / "scheduler" / folder.CONFIGS["scheduler"], schedule)
    files.write_bytes(target / folder.INDEX, (root / folder.INDEX).read_bytes())
    return target


def pack(
    source: Path | str,
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    change: Change = dict,
) -> Path:
    """Write a diffusers folder as a single file; how it was trained is read from its scheduler."""
    source, path = Path(source), Path(path)
    v_prediction, zero_terminal_snr = trained(source)
    if metadata is None:
        side = folder.read_config("vae", source)["sample_size"]
        metadata = modelspec(path.stem, resolution=(side, side), v_prediction=v_prediction)
    components = {component: folder.read_weights(component, source) for component in sgm.PREFIX}
    return write(
        path,
        change(components),
        metadata,
        v_prediction=v_prediction,
        zero_terminal_snr=zero_terminal_snr,
        dtype=dtype,
    )


def trained(source: Path) -> tuple[bool, bool]:
    """Whether the model of a diffusers folder predicts v, and whether its schedule ends without signal."""
    schedule = folder.read_config("scheduler", source)
    unsaid = untold(schedule)
    if unsaid:
        raise UserError(f"one file cannot say that a model {unsaid}", str(source), "keep it as a diffusers folder")
    return schedule.get("prediction_type") == "v_prediction", bool(schedule.get("rescale_betas_zero_snr"))


def untold(schedule: dict[str, Any]) -> str:
    """What programs that read one file would not know of a model with this scheduler, if anything."""
    if is_edm(schedule):
        return "has EDM's noise levels"
    return "predicts the picture itself" if schedule.get("prediction_type") == "sample" else ""


def write(
    path: Path | str,
    components: Mapping[str, sgm.Weights],
    metadata: Mapping[str, str],
    *,
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write all four components as one file, whole or not at all, each tensor in the dtype it has or in `dtype`."""
    path = Path(path)
    absent = [PARTS[component] for component in sgm.PREFIX if not components.get(component)]
    if absent:
        raise UserError(f"no weights given for {' and '.join(absent)}", str(path), "give all four components")
    tensors: dict[str, Tensor] = {}
    for component in sgm.PREFIX:
        tensors |= sgm.to_sgm(component, components[component])
    for name, wanted in ((V_PREDICTION, v_prediction), (ZERO_TERMINAL_SNR, zero_terminal_snr)):
        if wanted:
            tensors[name] = torch.empty(0)
    folder.write_tensors(path, tensors, metadata, dtype)
    return path


def _schedule(config: dict[str, Any], header: About) -> dict[str, Any]:
    """The scheduler's configuration with what the file says of its training."""
    if header.v_prediction:
        config = {**config, "prediction_type": "v_prediction"}
    if header.zero_terminal_snr:
        # Sampling must begin at the last timestep, the only one without signal (arXiv 2305.08891).
        config = {**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def refuse_pickle(path: Path) -> None:
    """UserError, with a way to convert it, for what `torch.save` wrote, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with eight bytes of length and the brace of its header.
    if start.startswith(PICKLED) and start[8:] != b"{":
        raise UserError("a pickle can run code when it is opened, so none is read", str(path), TO_SAFETENSORS)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open safetensors file; anything else is refused with what to do about it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError("there is no such model file", str(path), "check the path; it must be one .safetensors file")
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(
            f"this is not a whole safetensors file: {error}", str(path), "download or convert the file again"
        ) from error
