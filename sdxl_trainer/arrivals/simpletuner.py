"""Configs of SimpleTuner: config.json (or flags) and the file of its data backends."""

from pathlib import Path
from typing import Any

from sdxl_trainer.arrivals import common, reading, simpletuner_data
from sdxl_trainer.arrivals.account import Account, plain
from sdxl_trainer.arrivals.kohya_network import BLOCKS
from sdxl_trainer.arrivals.reading import Command
from sdxl_trainer.errors import UserError

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
_CACHED = "latents and embeddings are always cached; the key of a row is what it is made of"
_KEPT = {
    "output_dir": "output_dir",
    "seed": "seed",
    "pretrained_vae_model_name_or_path": "model.vae",
    "revision": "model.revision",
    "variant": "model.variant",
    "max_grad_norm": "train.max_grad_norm",
    "snr_gamma": "objective.snr_gamma",
    "input_perturbation": "objective.input_perturbation",
    "rescale_betas_zero_snr": "objective.zero_terminal_snr",
    "checkpoints_total_limit": "train.checkpoints_limit",
    "validation_seed": "validation.seed",
    "validation_num_inference_steps": "validation.steps",
    "validation_negative_prompt": "validation.negative",
    "validation_on_startup": "validation.at_start",
    "use_ema": "ema.enabled",
    "ema_decay": "ema.decay",
    "push_to_hub": "hub.push",
    "hub_model_id": "hub.id",
    "tracker_project_name": "log.project",
    "allow_tf32": "train.tf32",
    "timestep_bias_strategy": "timesteps.bias",
    "timestep_bias_multiplier": "timesteps.multiplier",
    "timestep_bias_begin": "timesteps.begin",
    "timestep_bias_end": "timesteps.end",
    "timestep_bias_portion": "timesteps.portion",
    "lr_num_cycles": "schedule.cycles",
    "lr_power": "schedule.power",
    "huber_c": "objective.delta",
    "huber_schedule": "objective.delta_schedule",
    "init_lora": "adapter.start",
    "vae_batch_size": "cache.batch_size",
}
# How often, and whether in epochs; two of them have older names.
_SAVED = {"checkpoint_step_interval": False, "checkpointing_steps": False, "checkpoint_epoch_interval": True}
_DRAWN = {"validation_step_interval": False, "validation_steps": False, "validation_epoch_interval": True}
_ANYWAY = {
    "model_family": "SDXL",
    "model_flavour": "model.path",
    "resume_from_checkpoint": "the same command always continues",
    "attention_mechanism": "attention is PyTorch's (model.attention)",
    "vae_dtype": "the VAE encodes in fp32 (cache.vae_precision)",
}
_DROPPED = {
    "disable_benchmark": "no pictures of the base unless validation.at_start is set",
    "report_to": "numbers go to metrics.jsonl; see log.trackers",
    "tracker_run_name": "the folder of a run is its name",
    "aspect_bucket_rounding": "pictures go to the bucket of the nearest ratio, not rounded",
    "minimum_image_size": "small pictures are told of and refused by max_upscale, not left out",
    "lr_end": "the learning rate ends at 0",
    "lr_scale": "multiply the learning rate yourself",
    "lr_scale_sqrt": "multiply the learning rate yourself",
    "webhook_config": "nobody is called",
    "validation_guidance_rescale": "not done",
    "validation_prompt_library": "write prompts as validation.prompts",
    "user_prompt_library": "write prompts as validation.prompts",
    "validation_disable_unconditional": "an empty prompt is drawn if it is one of validation.prompts",
    "validation_torch_compile": "not done",
    "quantize_via": "decided by the package",
    "text_encoder_1_precision": "encoders leave memory once captions are encoded",
    "text_encoder_2_precision": "encoders leave memory once captions are encoded",
    "ema_update_interval": "averages are updated in every step",
    "ema_device": "averages lie beside the weights",
    "push_checkpoints_to_hub": "checkpoints stay here",
    "override_dataset_config": _CACHED,
    "compress_disk_cache": _CACHED,
    "preserve_data_backend_cache": _CACHED,
    "dataloader_prefetch": "train.workers",
    "dataloader_prefetch_qlen": "train.workers",
    "max_workers": "cache.workers",
    "write_batch_size": "cache.batch_size",
    "torch_num_threads": "OMP_NUM_THREADS",
    "gradient_precision": "gradients are of the weights' type",
    "optimizer_release_gradients": "no step in the backward pass",
    "evaluation_type": "measured on held-out pictures: data.held_out",
    "num_eval_images": "data.held_out",
    "input_perturbation_steps": "it stays the same over the run",
    "noise_offset_probability": "the offset is always added",
    "validation_preview": "previews are drawn to the end",
    "delete_problematic_images": "nothing is deleted",
    "delete_unwanted_images": "nothing is deleted",
    "cache_dir": "cache.path",
    "cache_dir_vae": "cache.path",
    "cache_dir_text": "cache.path",
    "cache_file_suffix": "cache.path",
    "accelerator_cache_clear_interval": "decided by the package",
    "ignore_missing_files": "missing files are an error",
}
_NARROW = {"int8": "int8", "int4": "nf4", "nf4": "nf4", "fp8": "fp8", "int2": "nf4"}


def account(path: Path, tree: dict[str, Any], command: Command | None, data: Path | None) -> Account:
    """Account for a config's options. UserError for other models."""
    options = dict(command.flags) if command else {str(k).removeprefix("--"): v for k, v in tree.items()}
    made = Account(options, str(path))
    family = made.text("model_family", "")
    if family.lower() != "sdxl":
        raise UserError(f"this config trains '{family}', not SDXL", str(path), "give one with model_family sdxl")
    place = made.text("pretrained_model_name_or_path")
    if place:
        made.kept("pretrained_model_name_or_path", "model.path", place)
    else:
        made.assumed("model.path", BASE, "SDXL base, which model_flavour stands for")
    made.drop_all({"pretrained_model_name_or_path": ""})
    simpletuner_data.backends(made, path, data)
    _training(made)
    _method(made, path)
    _objective(made)
    _previews(made)
    common.interval(made, "train.checkpoint_every", _SAVED)
    if not made.has("output_dir"):
        made.assumed("output_dir", "output/models", "the default there")
    made.keep_all(_KEPT)
    launcher = made.inner(command.launcher if command else {}, "accelerate")
    launcher.do_anyway(dict.fromkeys(list(launcher.options), "accelerate launch takes it here too"))
    made.do_anyway(_ANYWAY)
    made.drop_all(_DROPPED)
    made.finish()
    return made


def _training(made: Account) -> None:
    micro, times = int(made.number("train_batch_size", 4)), int(made.number("gradient_accumulation_steps", 1))
    made.put("train.micro_batch", micro)
    if made.has("train_batch_size") and times > 1:
        made.changed("train_batch_size", "train.batch_size", micro * times, f"of an optimizer step: {micro} x {times}")
    elif made.has("train_batch_size"):
        made.kept("train_batch_size", "train.batch_size", micro)
    else:
        made.assumed("train.batch_size", micro * times, "the default of train_batch_size")
    made.part("gradient_accumulation_steps", "train.batch_size, beside train.micro_batch")
    steps, epochs = made.number("max_train_steps"), made.number("num_train_epochs")
    if steps:
        made.kept("max_train_steps", "train.steps", int(steps))
    elif epochs:
        made.kept("num_train_epochs", "train.epochs", int(epochs))
    else:
        made.assumed("train.epochs", 1, "the default of num_train_epochs")
    made.drop_all({"max_train_steps": "", "num_train_epochs": "max_train_steps has the last word"})
    _rate(made, int(steps) if steps else None)
    precision = made.text("mixed_precision", "bf16")
    became = {"no": "fp32"}.get(precision, precision)
    if made.has("mixed_precision") and precision in {"no", "fp16", "bf16"}:
        made.kept("mixed_precision", "train.precision", became)
    elif precision in {"fp16", "bf16"}:
        made.assumed("train.precision", became, "the default there")
    for switch in ("gradient_checkpointing", "use_gradient_checkpointing"):
        if switch in made.options:
            made.kept(switch, "train.gradient_checkpointing", bool(made.look(switch)))
    if "gradient_checkpointing" not in made.tree["train"]:
        made.assumed("train.gradient_checkpointing", True, "the default there")
    every = made.number("gradient_checkpointing_interval", 1)
    if every > 1 and made.tree["train"]["gradient_checkpointing"]:
        made.changed("gradient_checkpointing_interval", "train.gradient_checkpointing", 1 / every, "a share here")
    made.unused("gradient_checkpointing_interval")


def _rate(made: Account, steps: int | None) -> None:
    """The optimizer, and the learning rate over the run."""
    arguments: dict[str, Any] = {}
    for word in str(made.options.pop("optimizer_config", None) or "").split(","):
        name, equals, value = word.partition("=")
        if equals:
            arguments[name.strip()] = plain(value)
    if made.has("adam_weight_decay"):
        arguments["weight_decay"] = made.number("adam_weight_decay")
    if made.has("adam_beta1") and made.has("adam_beta2"):
        arguments["betas"] = [float(made.number("adam_beta1")), float(made.number("adam_beta2"))]
    for name in ("adam_weight_decay", "adam_beta1", "adam_beta2", "optimizer_beta1", "optimizer_beta2"):
        made.part(name, "[optimizer]")
    name = common.optimizer(made, "optimizer", made.text("optimizer", "adamw_bf16"), arguments, "optimizer_config")
    common.learning_rate(made, "learning_rate", float(made.number("learning_rate", 4e-7)), name)
    warmup = ("lr_warmup_steps", made.number("lr_warmup_steps", 0))
    common.schedule(made, "lr_scheduler", made.text("lr_scheduler", "constant_with_warmup"), warmup, steps)
    made.unused("lr_warmup_steps")


def _method(made: Account, path: Path) -> None:
    if made.text("model_type", "full") == "full":
        made.part("model_type", "the UNet itself learns")
        if made.tree["optimizer"]["name"] == "adamw_bf16":
            made.assumed("train.weights", "bf16", "weights are bf16 there with this optimizer")
            made.put("train.precision", "bf16")
        made.drop_all(
            {name: "the UNet itself learns" for name in ("lora_type", "lora_rank", "lora_alpha", "lora_dropout")}
        )
        made.drop_all({"base_model_precision": "the UNet itself learns", "use_dora": "the UNet itself learns"})
        return
    if made.tree["optimizer"]["name"] == "adamw_bf16":
        made.amended("optimizer.name", "adamw", "adapters are always fp32, and need no rounding by chance")
    kind = "dora" if made.look("use_dora") else "lora"
    if made.text("lora_type", "standard") == "lycoris":
        kind = _lycoris(made, path)
    else:
        made.put("adapter.targets", "attention")
        rank = int(made.number("lora_rank", 16))
        made.put("adapter.rank", rank)
        made.put("adapter.alpha", float(made.number("lora_alpha", rank)))
        made.part("lora_rank", "adapter.rank")
        made.part("lora_alpha", "adapter.alpha")
        if made.has("lora_dropout"):
            made.kept("lora_dropout", "adapter.dropout", float(made.number("lora_dropout")))
    made.put("adapter.kind", kind)
    made.part("model_type", "[adapter]")
    for name in ("use_dora", "lora_type"):
        made.part(name, f"adapter.kind = {kind}")
    made.put("export.formats", ["kohya"])
    made.drop_all({"lora_format": "diffusers' and kohya's keys are both written", "lora_init_type": "adapter.init"})
    made.drop_all({"lora_rank": "lycoris_config has the last word", "lora_alpha": "lycoris_config has the last word"})
    if made.has("base_model_precision"):
        given = made.text("base_model_precision")
        narrow = next((ours for start, ours in _NARROW.items() if given.startswith(start)), None)
        if narrow:
            made.kept("base_model_precision", "train.frozen", narrow)
    made.drop_all({"base_model_precision": "as computed", "base_model_default_dtype": "as computed"})


def _lycoris(made: Account, path: Path) -> str:
    named = made.text("lycoris_config", "config/lycoris_config.json")
    places = (Path(named), path.parent / named, path.parent / Path(named).name)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        what = f"the adapter is described in '{named}', and there is no such file"
        raise UserError(what, str(path), "put it beside the config")
    made.part("lycoris_config", "[adapter]")
    inner = made.inner(reading.tree(found), "lycoris_config")
    algorithm = inner.text("algo", "lora").lower()
    kinds = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
    if algorithm not in kinds:
        raise UserError(f"the algorithm '{algorithm}' is not available here", str(found), f"known: {', '.join(kinds)}")
    inner.part("algo", "adapter.kind")
    inner.kept("linear_dim", "adapter.rank", int(inner.number("linear_dim", 4)))
    inner.kept("linear_alpha", "adapter.alpha", float(inner.number("linear_alpha", 1.0)))
    preset = inner.options.pop("apply_preset", None) or {}
    targets = preset.get("target_module", [])
    inner.put(
        "adapter.targets",
        "attention" if targets == ["Attention"] else r"unet\..*\.attentions\..*" if targets else BLOCKS,
    )
    if algorithm == "lokr":
        _factors(inner, preset.get("module_algo_map") or {}, targets)
        common.kronecker(inner, inner)
    inner.drop_all({"factor": "of LoKr alone", "full_matrix": "of LoKr alone", "bypass_mode": "decided here"})
    inner.drop_all({"multiplier": "", "use_scalar": "no learned scale for each layer"})
    inner.finish()
    return kinds[algorithm]


def _factors(inner: Account, own: dict[str, Any], targets: list[Any]) -> None:
    """One factor for all layers: that of the first kind that has its own, which goes before the general one there."""
    factors = {kind: own[kind]["factor"] for kind in targets if "factor" in (own.get(kind) or {})}
    if not factors:
        return
    first = next(iter(factors.values()))
    if len(set(factors.values())) > 1:
        inner.note(f"factors by kind of layer, {factors}, are one here: {first}")
    inner.options["factor"] = first


def _objective(made: Account) -> None:
    if made.text("prediction_type", "") in {"epsilon", "v_prediction", "sample"}:
        made.kept("prediction_type", "objective.prediction", made.text("prediction_type"))
    if made.look("offset_noise"):
        made.put("objective.noise_offset", float(made.number("noise_offset", 0.1)))
        made.part("offset_noise", "objective.noise_offset")
        made.part("noise_offset", "objective.noise_offset")
    made.drop_all({"noise_offset": "offset_noise is off", "offset_noise": "", "prediction_type": "the base's"})
    if made.look("use_soft_min_snr") and made.has("snr_gamma"):
        made.changed("use_soft_min_snr", "objective.weighting", "soft_min_snr", "there the switch is not looked at")
    loss = made.text("loss_type", "l2")
    if loss in {"huber", "smooth_l1"}:
        made.kept("loss_type", "objective.loss", loss)
        if not made.has("huber_schedule"):
            made.assumed("objective.delta_schedule", "snr", "the default there")
    made.drop_all({"loss_type": "the squared error"})
    if made.tree.get("objective", {}).get("loss") is None:
        made.drop_all({"huber_c": "the squared error has no such part", "huber_schedule": "no such part"})


def _previews(made: Account) -> None:
    names: tuple[str, ...] = (
        "validation_prompt",
        "validation_resolution",
        "validation_guidance",
        "validation_seed",
    )
    names += ("validation_num_inference_steps", "validation_negative_prompt", *_DRAWN)
    if not made.has("validation_prompt"):
        made.drop_all(dict.fromkeys((*names, "num_validation_images"), "there is no validation_prompt"))
        return
    made.kept("validation_prompt", "validation.prompts", [made.text("validation_prompt")])
    made.put("validation.images", int(made.number("num_validation_images", 1)))
    common.interval(made, "train.validate_every", _DRAWN)
    made.part("num_validation_images", "validation.images")
    if made.has("validation_guidance"):
        made.kept("validation_guidance", "validation.guidance", float(made.number("validation_guidance")))
    if made.has("validation_resolution"):
        first = made.text("validation_resolution").split(",")[0].lower().split("x")
        width, height = int(float(first[0])), int(float(first[-1]))
        why = "width and height of all pictures: the first size"
        made.changed("validation_resolution", "validation.width", width // 8 * 8, why)
        made.put("validation.height", height // 8 * 8)
