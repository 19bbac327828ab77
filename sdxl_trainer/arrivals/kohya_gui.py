"""The JSON of the kohya_ss GUI: the same options as sd-scripts', some under other names, some in other units."""

import shlex
from typing import Any

from sdxl_trainer.arrivals import reading
from sdxl_trainer.arrivals.account import plain
from sdxl_trainer.errors import UserError

# LoRA_type -> network_module and what else it means.
_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Standard": ("networks.lora", {}),
    "Kohya LoCon": ("networks.lora", {}),
    "LoRA-FA": ("networks.lora_fa", {}),
    "Kohya LoHa": ("networks.loha", {}),
    "Kohya LoKr": ("networks.lokr", {}),
    "LoCon": ("lycoris.kohya", {"algo": "locon"}),
    "LyCORIS/LoCon": ("lycoris.kohya", {"algo": "locon"}),
    "LyCORIS/LoHa": ("lycoris.kohya", {"algo": "loha"}),
    "LyCORIS/LoKr": ("lycoris.kohya", {"algo": "lokr"}),
    "LyCORIS/BOFT": ("lycoris.kohya", {"algo": "boft"}),
    "LyCORIS/Diag-OFT": ("lycoris.kohya", {"algo": "diag-oft"}),
    "LyCORIS/Native Fine-Tuning": ("lycoris.kohya", {"algo": "full"}),
}
_LYCORIS = tuple(
    """
    conv_dim conv_alpha rank_dropout module_dropout rank_dropout_scale use_tucker use_scalar dora_wd bypass_mode
    train_norm decompose_both factor use_cp constrain rescaled
    """.split()
)
_LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_PLAIN = (
    *"block_dims block_alphas rank_dropout module_dropout".split(),
    *_LORA_PLUS,
    *"down_lr_weight mid_lr_weight up_lr_weight conv_block_dims conv_block_alphas".split(),
)
# Which of them a network is given.
_ARGUMENTS = {"networks.lora": _PLAIN, "networks.lora_fa": _PLAIN, "lycoris.kohya": (*_LYCORIS, *_LORA_PLUS)}
_ARGUMENTS |= dict.fromkeys(
    ("networks.loha", "networks.lokr"), ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout")
)
_OF_NETWORKS = {*_LYCORIS, *_PLAIN, "LyCORIS_preset", "unit", "train_on_input", "block_lr_zero_threshold", "conv_dims"}
_OF_NETWORKS |= {"conv_alphas"}
_LAUNCHER = tuple(
    """
    num_processes num_machines multi_gpu num_cpu_threads_per_process main_process_port gpu_ids dynamo_mode
    dynamo_use_fullgraph dynamo_use_dynamic extra_accelerate_launch_args
    """.split()
)
_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "vae_path": "vae",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "lora_network_weights": "network_weights",
    "stop_text_encoder_training_pct": "stop_text_encoder_training",
}
# The page for whole models calls some by other names.
_FINETUNING = {"image_folder": "train_data_dir", "batch_size": "train_batch_size", "train_dir": "work_folder"}
# That page writes the captions beside the pictures into one file, and may name another for the sizes.
_METADATA = ("caption_metadata_filename", "latent_metadata_filename")
# Of the window, not of the training.
_WINDOW = tuple(
    """
    sdxl v2 train_data_dir_input print_only headless model_list folders no_token_padding sdxl_checkbox
    create_buckets create_caption full_path use_latent_files work_folder generate_image_buckets
    """.split()
)
_OTHER_MODELS = tuple(
    """
    flux sd3 t5xxl hunyuan anima lumina clip_g clip_l img_ txt_ single_ discrete_flow guidance_scale
    timestep_sampling double_ ae apply_t5 model_prediction
    """.split()
)


def options(tree: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The options of sd-scripts that the GUI would give, those of the launcher, and those that it would not look at.
    UserError for what is not SDXL."""
    given = dict(tree)
    if given.get("sdxl") is False or given.get("v2") is True:
        raise UserError("this config does not train SDXL (its box is not ticked)", where, "give one for SDXL")
    method = str(given.pop("LoRA_type", "") or "")
    if not method and "image_folder" in given:
        given = _finetuning(given)
    for old, new in _NAMES.items():
        if old in given:
            given[new] = given.pop(old)
    _numbers(given)
    used = {*_NAMES, *_FINETUNING, *_METADATA, "LoRA_type", "epoch", "lr_warmup", "additional_parameters", *_LAUNCHER}
    if method:
        network = _network(given, method, where)
        used |= {*network.get("network_args", {}), "LyCORIS_preset"}
        given |= network
    extra = shlex.split(str(given.pop("additional_parameters", "") or ""))
    given |= reading.flags(extra)
    launcher = {name: given.pop(name) for name in _LAUNCHER if name in given}
    unused = {*_WINDOW, *_OF_NETWORKS} | {name for name in given if name.startswith(_OTHER_MODELS)}
    given = {name: value for name, value in given.items() if name not in unused}
    return given, launcher, [name for name in tree if name not in used and name not in given]


def _finetuning(tree: dict[str, Any]) -> dict[str, Any]:
    """The options of the page for whole models under the names of the script."""
    given = {_FINETUNING.get(name, name): value for name, value in tree.items()}
    captions, latents = (given.pop(name, "") for name in _METADATA)
    name = latents if given.pop("use_latent_files", "No") == "Yes" and latents else captions
    if name:
        given["in_json"] = f"{given.get('work_folder') or '.'}/{name}"
    return {"enable_bucket": True, **given}


def _network(given: dict[str, Any], method: str, where: str) -> dict[str, Any]:
    """network_module and its arguments for a type of LoRA."""
    if method not in _NETWORKS:
        what = f"the LoRA type '{method}' is not available here"
        raise UserError(what, where, f"known are {', '.join(_NETWORKS)}")
    module, arguments = _NETWORKS[method]
    names = _ARGUMENTS[module] + (("conv_dim", "conv_alpha") if method == "Kohya LoCon" else ())
    values = {name: plain(given.get(name)) for name in names}
    arguments = {**arguments, **{n: v for n, v in values.items() if v not in (None, "", False, 0)}}
    if module == "lycoris.kohya":
        arguments = {"preset": given.get("LyCORIS_preset", "full"), **arguments}
    unet_only = {"network_train_unet_only": True} if plain(given.get("text_encoder_lr")) in (0, 0.0) else {}
    return {"network_module": module, "network_args": arguments, **unet_only}


def _numbers(given: dict[str, Any]) -> None:
    """What the GUI has in other units or leaves at 0 for "not given"."""
    epochs = plain(given.pop("epoch", None))
    if not plain(given.get("max_train_epochs")) and not plain(given.get("max_train_steps")) and epochs:
        given["max_train_epochs"] = epochs
    share = plain(given.pop("lr_warmup", 0)) or 0
    if share and not plain(given.get("lr_warmup_steps")):
        given["lr_warmup_steps"] = share / 100
    for name in ("max_train_steps", "max_train_epochs", "lr_warmup_steps", "seed"):
        if plain(given.get(name)) in (0, "", None):
            given.pop(name, None)
    kind = given.pop("noise_offset_type", "Original")
    unused: tuple[str, ...] = ("multires_noise_iterations", "multires_noise_discount")
    if kind == "Multires":
        unused = ("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")
    for name in unused:
        given.pop(name, None)
    attention = given.pop("xformers", None)
    if attention not in (None, "none", False, ""):
        given["xformers" if attention in (True, "xformers") else "sdpa"] = True
    prompts = str(given.get("sample_prompts") or "")
    if "\n" in prompts.strip() or (prompts and not prompts.strip().endswith((".txt", ".toml", ".json"))):
        given["sample_prompts"] = prompts.strip()
