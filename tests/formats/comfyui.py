"""How ComfyUI reads an adapter for SDXL: which names it knows, what it makes of their tensors.

Written anew from the behaviour of `comfy/lora.py` (`model_lora_keys_unet`, `model_lora_keys_clip`, `load_lora`),
`comfy/utils.py` (`unet_to_diffusers`) and `comfy/weight_adapter/` of comfyanonymous/ComfyUI, with NumPy, from the names
of the official model file: nothing here comes from the converter under test.
"""

import re
from collections.abc import Mapping

import numpy as np

from tests.formats import official

Arrays = Mapping[str, np.ndarray]

# Ends of a module's tensors that are looked for.
ENDS = {".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha", ".dora_scale", ".diff", ".diff_b"}
ENDS |= {f".hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
ENDS |= {f".lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}
TEXT = ("mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj")


def key_map() -> dict[str, str]:
    """kohya's name of a module -> the weight in ComfyUI's model."""
    table = {}
    for name in official.unet():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            table["lora_unet_" + module.replace(".", "_")] = f"diffusion_model.{name}"
    # Text encoders have transformers' names there; the second is rewritten from OpenCLIP's as it is loaded.
    for number, (clip, layers) in enumerate((("clip_l", 12), ("clip_g", 32)), start=1):
        for layer in range(layers):
            for part in TEXT:
                weight = f"{clip}.transformer.text_model.encoder.layers.{layer}.{part}.weight"
                table[f"lora_te{number}_text_model_encoder_layers_{layer}_{part.replace('.', '_')}"] = weight
    table["lora_te1_text_projection"] = "clip_l.transformer.text_projection.weight"
    table["lora_te2_text_projection"] = "clip_g.transformer.text_projection.weight"
    return table


def loaded(names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The weights that a file's tensors patch, each with its names, and the names that are not loaded."""
    known = key_map()
    patches: dict[str, list[str]] = {}
    left = []
    for name in names:
        end = next((end for end in sorted(ENDS, key=len, reverse=True) if name.endswith(end)), None)
        module = name.removesuffix(end) if end else name
        if end and module in known:
            patches.setdefault(known[module], []).append(name)
        else:
            left.append(name)
    return patches, left


def patched(weight: np.ndarray, module: str, tensors: Arrays, strength: float = 1.0) -> np.ndarray:
    """The weight with one module's tensors applied, in float64."""
    own = {
        re.sub(r"\.weight$", "", name.removeprefix(module + ".")): t
        for name, t in tensors.items()
        if name.startswith(module + ".")
    }
    own = {name: np.asarray(value, dtype=np.float64) for name, value in own.items()}
    weight = weight.astype(np.float64)
    if "hada_w1_a" in own:
        product, rank = _hada(own), own["hada_w1_b"].shape[0]
    elif "lora_up" in own:
        product, rank = _lora(own), own["lora_down"].shape[0]
    else:
        product, rank = _lokr(own)
    scale = float(own["alpha"]) / rank if "alpha" in own and rank else 1.0
    change = scale * product.reshape(weight.shape)
    if "dora_scale" not in own:
        return weight + strength * change
    new, scales = weight + change, own["dora_scale"]
    assert scales.shape[0] == weight.shape[0], "one magnitude per output"
    # ComfyUI divides by the norm of the weight without its change here (base.py, `wd_on_output_axis`).
    norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight + strength * (new * (scales / norms) - weight)


def _lora(own: Arrays) -> np.ndarray:
    up, down = own["lora_up"], own["lora_down"]
    if "lora_mid" in own:
        flat = down.reshape(down.shape[0], down.shape[1])
        down = np.einsum("mnkl,ni->mikl", own["lora_mid"], flat)
    return up.reshape(len(up), -1) @ down.reshape(len(down), -1)


def _hada(own: Arrays) -> np.ndarray:
    halves = []
    for number in "12":
        a, b = own[f"hada_w{number}_a"], own[f"hada_w{number}_b"]
        halves.append(np.einsum("ijkl,jr,ip->prkl", own[f"hada_t{number}"], b, a) if "hada_t1" in own else a @ b)
    return halves[0] * halves[1]


def _lokr(own: Arrays) -> tuple[np.ndarray, int]:
    rank = 0
    first = own.get("lokr_w1")
    if first is None:
        first, rank = own["lokr_w1_a"] @ own["lokr_w1_b"], own["lokr_w1_b"].shape[0]
    second = own.get("lokr_w2")
    if second is None:
        rank = own["lokr_w2_b"].shape[0]
        if "lokr_t2" in own:
            second = np.einsum("ijkl,jr,ip->prkl", own["lokr_t2"], own["lokr_w2_b"], own["lokr_w2_a"])
        else:
            second = own["lokr_w2_a"] @ own["lokr_w2_b"]
    return np.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second), rank
