"""Samplers by the names that user interfaces give them."""

import inspect
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.schedule import is_edm


@dataclass(frozen=True)
class Sampler:
    """A class of diffusers with its options, and the name that ComfyUI has for it (None: it has none)."""

    kind: str
    options: dict[str, Any]
    comfy: str | None


# By A1111's names.
SAMPLERS: dict[str, Sampler] = {
    "Euler": Sampler("EulerDiscreteScheduler", {}, "euler"),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler", {}, "euler_ancestral"),
    "Heun": Sampler("HeunDiscreteScheduler", {}, "heun"),
    "DPM2": Sampler("KDPM2DiscreteScheduler", {}, "dpm_2"),
    "DPM2 a": Sampler("KDPM2AncestralDiscreteScheduler", {}, "dpm_2_ancestral"),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, "dpmpp_2m"),
    "DPM++ 2M SDE": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    "DPM++ SDE": Sampler("DPMSolverSinglestepScheduler", {"lower_order_final": True}, "dpmpp_sde"),
    "UniPC": Sampler("UniPCMultistepScheduler", {}, "uni_pc"),
    "DDIM": Sampler("DDIMScheduler", {}, "ddim"),
    "DDPM": Sampler("DDPMScheduler", {}, "ddpm"),
    "PLMS": Sampler("PNDMScheduler", {"skip_prk_steps": True}, "ipndm"),
    "DEIS": Sampler("DEISMultistepScheduler", {}, "deis"),
    "LCM": Sampler("LCMScheduler", {}, "lcm"),
}
# Spacings of the noise levels: A1111's name -> options of diffusers, ComfyUI's name.
SPACINGS: dict[str, tuple[dict[str, Any], str]] = {
    "": ({}, "normal"),
    "Karras": ({"use_karras_sigmas": True}, "karras"),
    "Exponential": ({"use_exponential_sigmas": True}, "exponential"),
    "SGM Uniform": ({"timestep_spacing": "trailing"}, "sgm_uniform"),
}
# Packages that diffusers asks for when it makes one of these.
_NEEDS = {
    "LMSDiscreteScheduler": "scipy",
    "DPMSolverSDEScheduler": "torchsde",
    "CosineDPMSolverMultistepScheduler": "torchsde",
}
_EDM = {"Euler": "EDMEulerScheduler", "DPM++ 2M": "EDMDPMSolverMultistepScheduler"}


def split(name: str, where: str = "--sampler") -> tuple[str, str]:
    """A sampler's name in parts: A1111's name and spacing, from A1111's or ComfyUI's spelling in any case."""
    flat = " ".join(name.replace("_", " ").split()).lower()
    for sampler, facts in SAMPLERS.items():
        for spelled in (sampler, facts.comfy or sampler):
            for spacing, (_, comfy) in SPACINGS.items():
                for spaced in (spacing, comfy):
                    if f"{spelled} {spaced}".replace("_", " ").strip().lower() == flat:
                        return sampler, spacing
    names = [f"{sampler} {spacing}".strip() for sampler in SAMPLERS for spacing in SPACINGS]
    raise UserError(f"there is no sampler '{name}'", where, closest(name, names))


def scheduler(config: dict[str, Any], name: str | None) -> Any:
    """The scheduler of a model's config: the named sampler, or by default the one that SDXL comes with."""
    import diffusers

    if name is None:
        refuse_lacking(config)
        kind: Any = diffusers.EDMEulerScheduler if is_edm(config) else _own(config)
        return kind.from_config(config)
    sampler, spacing = split(name)
    if is_edm(config):
        if sampler not in _EDM or spacing:
            what = f"the sampler '{name}' with a model of EDM, which has noise levels of its own"
            raise UserError(what, "--sampler", f"use {' or '.join(_EDM)}")
        return getattr(diffusers, _EDM[sampler]).from_config(config)
    kind, options = getattr(diffusers, SAMPLERS[sampler].kind), SAMPLERS[sampler].options | SPACINGS[spacing][0]
    known = inspect.signature(kind.__init__).parameters
    if options.keys() - known.keys():
        raise UserError(f"the sampler '{sampler}' has no spacing '{spacing}'", "--sampler", f"use '{sampler}'")
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        what = f"the sampler '{sampler}' cannot begin at zero SNR, as this model wants"
        raise UserError(what, "--sampler", "use Euler, Euler a, DPM++ 2M, DDIM or UniPC")
    # Whether noise levels are Karras's and the like is the name's to say, not the config's.
    own = {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "algorithm_type"}
    return kind.from_config({key: value for key, value in config.items() if key not in own}, **options)


def refuse_lacking(config: dict[str, Any]) -> None:
    """Refuse a model's own sampler that cannot be made for want of a package."""
    name = config.get("_class_name", "")
    for package in [_NEEDS.get(name), "scipy" if config.get("use_beta_sigmas") else None]:
        if package and find_spec(package) is None:
            what = f"the base's own sampler {name} needs {package}, which is not installed"
            fix = f"pip install {package}; or name another: _class_name there (EulerDiscreteScheduler), or --sampler"
            raise UserError(what, "scheduler_config.json", fix)


def _own(config: dict[str, Any]) -> Any:
    """The class that a model names, where it is one of diffusers' own; Euler if it names none."""
    import diffusers

    name = config.get("_class_name", "EulerDiscreteScheduler")
    return getattr(diffusers, name, diffusers.EulerDiscreteScheduler)
