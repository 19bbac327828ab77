"""The names of adapters' tensors: those of diffusers and PEFT, of kohya, ComfyUI and LyCORIS, and older ones.

Every tensor's name is the name of a module and of its role there. Modules are known here by their diffusers path with
the part in front (`unet.mid_block...`, `text_encoder.text_model...`, `text_encoder_2.text_model...`), roles by the
values of `ROLES`. kohya names the UNet's modules as the original code does, with '_' for '.'; a name is taken apart
again by the words that occur in it, of which none is the beginning of another's continuation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import sgm

# End of a tensor's name -> its role. The longer end comes first where one ends like another.
ROLES = {
    ".lora_down.weight": "lora_down",
    ".lora_up.weight": "lora_up",
    ".lora_mid.weight": "lora_mid",
    ".lora_A.weight": "lora_down",
    ".lora_B.weight": "lora_up",
    ".lora_A.default.weight": "lora_down",
    ".lora_B.default.weight": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    "_lora.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    ".lora.down.weight": "lora_down",
    ".lora.up.weight": "lora_up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    ".lokr_t2": "lokr_t2",
    **{f".{name}": name for name in ("diff", "diff_b", "w_norm", "b_norm")},
}
KOHYA_ENDS = {
    "lora_down": ".lora_down.weight",
    "lora_up": ".lora_up.weight",
    "lora_mid": ".lora_mid.weight",
    "magnitude": ".dora_scale",
}
PEFT_ENDS = {"lora_down": ".lora_A.weight", "lora_up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
# Roles of adapters that nothing here can read, by the name that users know.
FOREIGN_ROLES = {
    ".oft_blocks": "OFT",
    ".oft_R": "OFT",
    ".boft_R": "BOFT",
    ".a1.weight": "GLoRA",
    ".on_input": "IA3",
    ".ia3_l": "IA3",
    ".vera_lambda": "VeRA",
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
COMFY = {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_WORDS = """input_blocks output_blocks middle_block down_blocks mid_block up_blocks resnets attentions downsamplers
upsamplers conv op transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out in_layers
out_layers emb_layers skip_connection time_embed label_emb out time_embedding add_embedding linear_1 linear_2
time_emb_proj conv1 conv2 conv_shortcut conv_in conv_out conv_norm_out norm norm1 norm2 norm3 text_model encoder layers
self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings token_embedding position_embedding
layer_norm1 layer_norm2 final_layer_norm""".split()
_WORD = re.compile("(?:" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r"|\d+)(?=_|$)")
_ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_OLD_TEXT = {"self_attn.to_q": "q_proj", "self_attn.to_k": "k_proj", "self_attn.to_v": "v_proj"}


@dataclass(frozen=True)
class Layout:
    """What the names of the original code depend on: the UNet's levels, and its layers in each."""

    levels: int = 3
    layers: int = 2


SDXL = Layout()


def split(name: str) -> tuple[str, str] | None:
    """The module's name and the role of a tensor; None if it is no adapter's."""
    end = next((end for end in ROLES if name.endswith(end)), None)
    return (name.removesuffix(end), ROLES[end]) if end else None


def module(name: str, layout: Layout = SDXL) -> str:
    """The diffusers path of a module from its name in any of the layouts; UserError if it is not SDXL's."""
    name = name.removeprefix("base_model.model.")
    for part, prefix in KOHYA.items():
        if name.startswith(prefix):
            return _from_original(part, _dotted(name, prefix), layout)
    if name.startswith("lora_te_"):
        return _from_original("text_encoder", _dotted(name, "lora_te_"), layout)
    for prefix, part in COMFY.items():
        if name.startswith(prefix):
            return _from_original(part, name.removeprefix(prefix), layout)
    part, _, rest = name.partition(".")
    if part not in KOHYA:
        part, rest = "unet", name  # files of attention processors name no part
    return f"{part}.{_modern(part, rest)}"


def kohya(module: str, layout: Layout = SDXL) -> str:
    """kohya's name of a module: `lora_unet_input_blocks_4_1_...`, `lora_te1_text_model_...`."""
    part, _, path = module.partition(".")
    if part == "unet":
        path = _renamed(path, _tables(layout)[0], layout)
    return KOHYA[part] + path.replace(".", "_")


def _from_original(part: str, path: str, layout: Layout) -> str:
    if part == "unet" and path.startswith(_ORIGINAL):
        path = _renamed(path, _tables(layout)[1], layout)
    return f"{part}.{path}"


def _modern(part: str, path: str) -> str:
    """A path as diffusers and PEFT write it now, from one of any age."""
    path = path.replace(".processor", "")
    if part == "unet":
        return f"{path}.0" if path.endswith(".to_out") else path
    for old, new in _OLD_TEXT.items():
        path = path.removesuffix(old) + f"self_attn.{new}" if path.endswith(old) else path
    path = path.removesuffix("to_out") + "out_proj" if path.endswith("self_attn.to_out") else path
    # transformers 5 leaves the prefix away, published files have it, and diffusers reads both.
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def _dotted(name: str, prefix: str) -> str:
    """The path in a name in which '.' became '_'."""
    rest, words = name.removeprefix(prefix), list[str]()
    at = 0
    while at < len(rest):
        word = _WORD.match(rest, at)
        if word is None:
            raise UserError(
                f"'{name}' names no module of SDXL",
                name,
                "this adapter is for another model; only adapters for SDXL are converted",
            )
        words.append(word[0])
        at = word.end() + 1
    return ".".join(words)


def _renamed(path: str, table: Mapping[str, str], layout: Layout) -> str:
    """The path with its longest beginning that the table knows replaced."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:length]))
        if found is not None:
            return ".".join([found, *parts[length:]])
    raise UserError(
        f"'{path}' is no module of a UNet with {layout.levels} levels of {layout.layers} layers",
        path,
        "if the adapter is for a UNet of another size, name its base: --base FOLDER",
    )


@cache
def _tables(layout: Layout) -> tuple[dict[str, str], dict[str, str]]:
    """Module names diffusers -> original, and back."""
    table = sgm.unet_modules(layout.levels, layout.layers)
    return table, {original: path for path, original in table.items()}
