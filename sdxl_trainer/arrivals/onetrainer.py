"""Configs of OneTrainer (JSON), with their concepts."""

from pathlib import Path
from typing import Any

from sdxl_trainer.arrivals import common, onetrainer_data
from sdxl_trainer.arrivals.account import Account
from sdxl_trainer.arrivals.kohya_network import ATTENTION, BLOCKS, TEXT, TRANSFORMERS
from sdxl_trainer.errors import UserError

_LAYERS = {"full": BLOCKS, "attn-mlp": TRANSFORMERS, "attn-only": ATTENTION}
_TYPES = {"FLOAT_32": "fp32", "TFLOAT_32": "fp32", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}
_NARROW = {"FLOAT_8": "fp8", "INT_8": "int8", "NFLOAT_4": "nf4", "INT_W8A8": "int8", "FLOAT_W8A8": "fp8"}
_NARROW |= {"INT_W8A8_COMPRESSED": "int8", "FLOAT_W8A8_COMPRESSED": "fp8"}
_CACHED = "latents and embeddings are always cached; the cache is never wrong, so it is never cleared"
_KEPT = {
    "base_model_name": "model.path",
    "epochs": "train.epochs",
    "clip_grad_norm": "train.max_grad_norm",
    "offset_noise_weight": "objective.noise_offset",
    "ema_decay": "ema.decay",
    "rescale_noise_scheduler_to_zero_terminal_snr": "objective.zero_terminal_snr",
}
_ANYWAY = {
    **dict.fromkeys(("latent_caching", "clear_cache_before_training", "only_cache"), _CACHED),
    "model_type": "SDXL",
    "continue_last_backup": "the same command always continues",
    "attention_mechanism": "attention is PyTorch's (model.attention)",
    "non_ema_sampling": "both kinds of weights are kept",
    "backup_before_save": "checkpoints are whole",
    "include_train_config": "the resolved config lies beside the result",
    "enable_autocast_cache": "decided by the package",
    "async_offloading": "decided by the package",
    "lora_weight_dtype": "adapters are always fp32",
    "embedding_weight_dtype": "new words are always fp32",
    "samples_to_tensorboard": "pictures lie in samples/",
}
_DROPPED = {
    "cache_dir": "cache.path",
    "workspace_dir": "the run's own folder holds everything",
    "train_device": "accelerate decides",
    "temp_device": "decided by the package",
    "generalized_offset_noise": "noise_offset is the same at all timesteps",
    "perturbation_noise_weight": "there it changes the target too; see objective.input_perturbation, which does not",
    "fallback_train_dtype": "no layer falls back",
    "compile": "decided by the package",
    "vb_loss_strength": "of other models",
    "log_cosh_strength": "no such loss",
    "loss_scaler": "a step's loss is the mean over its pictures",
    "ema_update_step_interval": "averages are updated in every step",
    "learning_rate_min_factor": "the learning rate ends at 0",
    "preserve_embedding_norm": "new words are not kept at one length",
    "bundle_additional_embeddings": "new words have files of their own",
    "lora_decompose_norm_epsilon": "decided by peft",
    "lora_decompose_output_axis": "DoRA's lengths are of the outputs",
    "optimizer_defaults": "of optimizers that are not used",
    "sample_image_format": "PNG",
    "save_filename_prefix": "export.name",
    "dynamic_timestep_shifting": "of flow models",
    "timestep_shift": "of flow models",
    "masked_prior_preservation_weight": "add a data set with regularisation and prior_prediction",
    "unmasked_probability": "masks are always used",
    "device_indexes": "accelerate launch decides",
    "gradient_reduce_precision": "decided by accelerate",
    "fused_gradient_reduce": "decided by accelerate",
    "async_gradient_reduce": "decided by accelerate",
    "async_gradient_reduce_buffer": "decided by accelerate",
    "multi_gpu": "accelerate launch decides",
    "text_encoder_sequence_length": "of other models",
    "text_encoder_2_sequence_length": "of other models",
    "svd_dtype": "of quantisation",
    "svd_rank": "of quantisation",
    "frames": "pictures have one frame",
}
_OTHER_PARTS = (
    "prior transformer text_encoder_3 text_encoder_4 effnet_encoder decoder quantization decoder_text_encoder "
    "decoder_vqgan unconditional_transformer cloud secrets text_encoder_3_layer_skip text_encoder_4_layer_skip "
    "concept_file_name sample_definition_file_name debug_dir tensorboard_port tensorboard_expose "
    "tensorboard_always_on embedding_learning_rate embedding additional_embeddings "
    "huggingface_cache_dir offline_mode "
).split()


def account(path: Path, tree: dict[str, Any], data: Path | None) -> Account:
    """Account for a config's options. UserError for other models."""
    made = Account(dict(tree), str(path))
    kind = made.text("model_type", "")
    if not kind.startswith("STABLE_DIFFUSION_XL") or "INPAINTING" in kind:
        what = f"this config trains {kind or 'the default, Stable Diffusion 1.5'}, not SDXL base"
        raise UserError(what, str(path), "give one with model_type STABLE_DIFFUSION_XL_10_BASE")
    onetrainer_data.concepts(made, path, data)
    _training(made)
    _method(made)
    _objective(made)
    _parts(made)
    _results(made, path)
    made.keep_all(_KEPT)
    if "epochs" not in made.tree["train"]:
        made.assumed("train.epochs", 100, "the default there")
    made.do_anyway(_ANYWAY)
    made.unused("__version", *_OTHER_PARTS)
    made.drop_all(_DROPPED)
    made.finish()
    return made


def _training(made: Account) -> None:
    micro, times = int(made.number("batch_size", 1)), int(made.number("gradient_accumulation_steps", 1))
    made.put("train.micro_batch", micro)
    made.put("train.batch_size", micro * times)
    made.part("batch_size", "train.micro_batch and train.batch_size")
    made.part("gradient_accumulation_steps", "train.batch_size, beside train.micro_batch")
    given = made.options.pop("optimizer", None) or {}
    given = given if isinstance(given, dict) else {"optimizer": given}
    kind = str(given.pop("optimizer", "ADAMW")).removesuffix("_ADV")
    betas = [given.pop("beta1", None), given.pop("beta2", None), given.pop("beta3", None)]
    arguments = {name: value for name, value in given.items() if value not in (None, False, "")}
    rounds = given.get("stochastic_rounding", True)
    off = [f"optimizer.{name}" for name in given if name not in arguments or name in _SWITCHES]
    arguments = {name: value for name, value in arguments.items() if name not in _SWITCHES}
    if betas[0] is not None and betas[1] is not None and kind != "ADAFACTOR":
        arguments["betas"] = [float(b) for b in betas if b is not None][: 3 if kind.startswith("CAME") else 2]
    made.off += off
    made.options["optimizer"] = kind
    name = common.optimizer(made, "optimizer", kind, arguments, "optimizer")
    _bf16(made, name, bool(rounds))
    rate, scale = float(made.number("learning_rate", 3e-6)), made.text("learning_rate_scaler", "NONE")
    common.learning_rate(made, "learning_rate", rate, name)
    if scale != "NONE":
        factor = {"BATCH": micro, "GRADIENT_ACCUMULATION": times, "BOTH": micro * times}.get(
            scale.removeprefix("GLOBAL_"), 1
        )
        made.changed("learning_rate_scaler", "train.learning_rate", rate * factor**0.5, f"the rate x sqrt({factor})")
    made.unused("learning_rate_scaler")
    warmup = made.number("learning_rate_warmup_steps", 200.0)
    if not made.has("learning_rate_warmup_steps"):
        made.options["learning_rate_warmup_steps"] = warmup
    shape = made.text("learning_rate_scheduler", "CONSTANT")
    common.schedule(made, "learning_rate_scheduler", shape, ("learning_rate_warmup_steps", warmup), None)
    if (
        made.tree.get("schedule", {}).get("warmup_steps")
        and made.tree["schedule"].get("name", "constant") == "constant"
    ):
        made.assumed("schedule.name", "constant_with_warmup", "the default there, with its warm-up")
    if "RESTARTS" in shape and made.has("learning_rate_cycles"):
        made.kept("learning_rate_cycles", "schedule.cycles", max(1, int(made.number("learning_rate_cycles"))))
    made.drop_all({"learning_rate_cycles": "no restarts", "scheduler_params": "no schedule of one's own"})
    if made.text("ema", "OFF") != "OFF":
        made.kept("ema", "ema.enabled", True)
    else:
        made.off += [
            n for n in ("ema", "ema_decay", "ema_update_step_interval") if made.options.pop(n, None) is not None
        ]
    if made.has("dataloader_threads"):
        made.kept("dataloader_threads", "train.workers", min(16, int(made.number("dataloader_threads"))))


_SWITCHES = {
    "stochastic_rounding",
    "fused",
    "fused_back_pass",
    "foreach",
    "adam_w_mode",
    "split_groups",
    "factored_fp32",
}
_SWITCHES |= {"split_groups_mean", "factored", "use_stableadamw", "weight_decay_by_lr", "d_limiter", "use_schedulefree"}
_SWITCHES |= {"rms_rescaling", "is_paged", "optim_bits", "min_8bit_size", "percentile_clipping", "quant_block_size"}
_SWITCHES |= {"muon_adam_config", "bias_correction", "decouple", "include"}


def _bf16(made: Account, name: str, rounds: bool) -> None:
    unet = made.options.get("unet")
    weights = str((unet or {}).get("weight_dtype", "FLOAT_32")) if isinstance(unet, dict) else "FLOAT_32"
    if made.text("training_method", "FINE_TUNE") != "FINE_TUNE":
        return
    if weights == "BFLOAT_16":
        made.assumed("train.weights", "bf16", "unet.weight_dtype")
        if name == "adamw" and rounds:
            made.amended("optimizer.name", "adamw_bf16", "stochastic rounding, as there")


def _method(made: Account) -> None:
    method = made.text("training_method", "FINE_TUNE")
    text = [p for p in ("text_encoder", "text_encoder_2") if _trains(made, p)]
    unet = ["unet"] if _trains(made, "unet") else []
    base = made.tree["train"]["learning_rate"]
    rates = {part: float((made.options.get(part) or {}).get("learning_rate") or base) for part in [*unet, *text]}
    if method == "EMBEDDING":
        _words(made)
    elif method == "LORA":
        _adapter(made, [*unet, *text])
    elif method != "FINE_TUNE":
        raise UserError(f"'{method}' is not available here", made.where, "known are FINE_TUNE, LORA, EMBEDDING")
    if method != "EMBEDDING":
        made.part("training_method", {"LORA": "[adapter]"}.get(method, "the model itself learns"))
        apart = len(set(rates.values())) > 1 and made.tree["optimizer"]["name"] != "prodigy"
        if apart or (method == "FINE_TUNE" and text):
            made.tree["learn"] = [{"match": rf"{part}\..*", "learning_rate": rate} for part, rate in rates.items()]
        elif rates and set(rates.values()) != {base} and made.tree["optimizer"]["name"] != "prodigy":
            made.put("train.learning_rate", next(iter(rates.values())))
    names = [n for n in made.options if n.startswith(("lora_", "lokr_", "oft_", "layer_filter", "peft_type"))]
    made.off += names
    for name in names:
        made.options.pop(name)


def _trains(made: Account, part: str) -> bool:
    found = made.options.get(part)
    return bool(found.get("train", True)) if isinstance(found, dict) else True


def _adapter(made: Account, parts: list[str]) -> None:
    kind = made.text("peft_type", "LORA").upper()
    kinds = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft", "OFT": "oft"}
    if kind not in kinds:
        raise UserError(f"the adapter '{kind}' is not available here", made.where, f"known are {', '.join(kinds)}")
    ours = "dora" if kind == "LORA" and made.look("lora_decompose") else kinds[kind]
    made.put("adapter.kind", ours)
    made.part("peft_type", f"adapter.kind = {ours}")
    made.part("lora_decompose", f"adapter.kind = {ours}")
    made.put("adapter.parts", parts)
    if ours == "oft":
        made.put("adapter.block_size", int(made.number("oft_block_size", 32)))
        made.part("oft_block_size", "adapter.block_size")
    else:
        rank = "lokr_dim" if kind == "LOKR" and made.has("lokr_dim") else "lora_rank"
        for name, option, default, number in ((rank, "rank", 16, int), ("lora_alpha", "alpha", 1.0, float)):
            if made.has(name):
                made.kept(name, f"adapter.{option}", number(made.number(name)))
            else:
                made.assumed(f"adapter.{option}", default, f"the default of {name}")
    filtered = made.text("layer_filter")
    preset = made.text("layer_filter_preset", "full")
    chosen = _LAYERS.get(preset, TRANSFORMERS)
    if preset in _LAYERS:
        made.part("layer_filter_preset", "adapter.targets")
    elif filtered:
        made.dropped("layer_filter", f"layers of its own naming; {chosen} is taken: look at adapter.targets")
    text = any(part != "unet" for part in parts)
    wanted = [chosen] * ("unet" in parts) + [TEXT] * text
    made.put("adapter.targets", wanted[0] if len(wanted) == 1 else f"({'|'.join(wanted)})")
    if ours == "lokr":
        common.kronecker(made, made, "lokr_decompose_factor", "lokr_full_matrix")
        names = ("lokr_decompose_both", "lokr_use_tucker", "lokr_weight_decompose")
        made.drop_all(dict.fromkeys(names, "LoKr's first factor is whole, its second a product of two at most"))
    if made.has("dropout_probability") and ours in {"lora", "dora"}:
        made.kept("dropout_probability", "adapter.dropout", float(made.number("dropout_probability")))
    if made.has("lora_model_name"):
        made.kept("lora_model_name", "adapter.start", made.text("lora_model_name"))


def _words(made: Account) -> None:
    given = [made.options.get("embedding") or {}, *(made.options.get("additional_embeddings") or [])]
    made.tree["token"] = []
    for word in given:
        token = {"name": str(word.get("placeholder", "<embedding>")), "vectors": int(word.get("token_count") or 1)}
        init = word.get("initial_embedding_text")
        made.tree["token"].append({**token, **({"init": init} if init and init != "*" else {})})
    made.part("training_method", "[[token]]")
    if made.has("embedding_learning_rate"):
        made.kept("embedding_learning_rate", "train.learning_rate", float(made.number("embedding_learning_rate")))


def _objective(made: Account) -> None:
    if made.look("force_v_prediction"):
        made.kept("force_v_prediction", "objective.prediction", "v_prediction")
    if made.look("force_epsilon_prediction"):
        made.kept("force_epsilon_prediction", "objective.prediction", "epsilon")
    weight, strength = made.text("loss_weight_fn", "CONSTANT"), float(made.number("loss_weight_strength", 5.0))
    if weight == "MIN_SNR_GAMMA":
        made.kept("loss_weight_fn", "objective.snr_gamma", strength)
    elif weight in {"P2", "DEBIASED_ESTIMATION"}:
        made.kept("loss_weight_fn", "objective.weighting", {"P2": "p2"}.get(weight, "debiased"))
        if weight == "P2":
            made.put("objective.p2_gamma", strength)
    elif weight != "CONSTANT":
        made.dropped("loss_weight_fn", "of flow models: all timesteps weigh alike")
    made.part("loss_weight_fn", "all timesteps weigh alike")
    made.off += ["loss_weight_strength"] * (made.options.pop("loss_weight_strength", None) is not None)
    _loss(made)
    _timesteps(made)


def _loss(made: Account) -> None:
    strengths = {
        name: made.number(f"{name}_strength", 1.0 if name == "mse" else 0.0) for name in ("mse", "mae", "huber")
    }
    if strengths["huber"] and not strengths["mse"]:
        made.kept("huber_strength", "objective.loss", "huber")
        made.put("objective.delta_schedule", "constant")
        made.put("objective.delta", float(made.number("huber_delta", 1.0)))
    elif strengths["mae"] and not strengths["mse"]:
        made.changed("mae_strength", "objective.loss", "smooth_l1", "smooth-L1 with a corner at 0.001")
        made.put("objective.delta_schedule", "constant")
        made.put("objective.delta", 1e-3)
    made.drop_all({"mae_strength": "losses are not added up: the squared error", "huber_strength": "the squared error"})
    made.off += [n for n in ("mse_strength", "huber_delta") if made.options.pop(n, None) is not None]


def _timesteps(made: Account) -> None:
    least, most = made.number("min_noising_strength", 0.0), made.number("max_noising_strength", 1.0)
    if least > 0 or most < 1:
        bounds = {"begin": round(least * 1000), "end": round(most * 1000)}
        for option, value in {"bias": "range", **bounds, "multiplier": 1e9}.items():
            made.put(f"timesteps.{option}", value)
        for name in ("min_noising_strength", "max_noising_strength"):
            made.part(name, "timesteps.bias = range: a billion times as often as the others")
    kind = made.text("timestep_distribution", "UNIFORM")
    if kind == "LOGIT_NORMAL":
        scale = float(made.number("noising_weight", 0.0)) + 1.0
        made.kept("timestep_distribution", "timesteps.density", "logit_normal")
        made.tree["timesteps"] |= {"location": float(made.number("noising_bias", 0.0)), "scale": scale}
        made.part("noising_weight", "timesteps.scale")
        made.part("noising_bias", "timesteps.location")
    elif kind != "UNIFORM":
        made.dropped("timestep_distribution", "timesteps are drawn equally often; see [timesteps]")
    made.part("timestep_distribution", "timesteps are drawn equally often")
    names = ("noising_weight", "noising_bias", "min_noising_strength", "max_noising_strength")
    made.off += [name for name in names if made.options.pop(name, None) is not None]


def _parts(made: Account) -> None:
    """unet, text encoders and vae: types, and what else they say."""
    trains = made.text("train_dtype", "FLOAT_16")
    if made.has("train_dtype") and trains in _TYPES:
        made.kept("train_dtype", "train.precision", _TYPES[trains])
    elif trains in _TYPES:
        made.assumed("train.precision", _TYPES[trains], "the default there")
    if made.tree["train"].get("weights") == "bf16":
        made.put("train.precision", "bf16")
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        given = made.options.pop(part, None)
        inner = made.inner(given if isinstance(given, dict) else {}, part)
        weights = inner.text("weight_dtype", "FLOAT_32")
        if part == "unet":
            checkpointing = inner.look("gradient_checkpointing", True)
            inner.put("train.gradient_checkpointing", bool(checkpointing))
            inner.part("gradient_checkpointing", "train.gradient_checkpointing")
            if "adapter" in made.tree and (weights in _NARROW or weights in _TYPES):
                inner.kept("weight_dtype", "train.frozen", (_NARROW | _TYPES)[weights])
        if part == "vae" and inner.has("model_name"):
            inner.kept("model_name", "model.vae", inner.text("model_name"))
        if part == "vae" and weights in _TYPES and inner.has("weight_dtype"):
            inner.kept("weight_dtype", "cache.vae_precision", _TYPES[weights])
        drop = {"stop_training_after": "learn: until, the share of the run after which a rule stops"}
        drop |= {"dropout_probability": "text.drop_encoder_1 and drop_encoder_2"}
        if part.startswith("text") and inner.has("dropout_probability"):
            option = "text.drop_encoder_1" if part == "text_encoder" else "text.drop_encoder_2"
            inner.kept("dropout_probability", option, float(inner.number("dropout_probability")))
        inner.drop_all(drop)
        inner.part("train", "what learns")
        inner.part("learning_rate", "learn, a rule for each model")
        inner.unused(*list(inner.options))
    for name in ("text_encoder_layer_skip", "text_encoder_2_layer_skip"):
        skip = made.number(name, 0)
        if skip:
            made.changed(name, "text.clip_skip", int(skip) + 2, "layers from the end, of both encoders")
        else:
            made.drop_all({name: ""})


def _results(made: Account, path: Path) -> None:
    where = Path(made.text("output_model_destination", f"models/{path.stem}"))
    name = where.stem or path.stem
    place = str(where.parent / name) if str(where.parent) != "." else f"runs/{name}"
    if made.has("output_model_destination"):
        made.changed("output_model_destination", "output_dir", place, "a run has a folder of its own")
    made.put("output_dir", place)
    made.put("export", {"name": name, "formats": ["kohya" if "adapter" in made.tree else "single"]})
    if "token" in made.tree or made.text("output_model_format") in {"DIFFUSERS", "INTERNAL"}:
        made.tree.pop("export")
    elif made.text("output_dtype") in _TYPES:
        made.kept("output_dtype", "export.dtype", _TYPES[made.text("output_dtype")])
    made.part("output_model_format", "export.formats, and diffusers' files beside")
    made.drop_all({"output_dtype": "files of the run are as trained"})
    if made.look("tensorboard", True) and made.has("tensorboard"):
        made.kept("tensorboard", "log.trackers", ["tensorboard"])
    _interval(made, "train.checkpoint_every", "save_every", "backup_after")
    if made.look("rolling_backup"):
        made.kept("rolling_backup_count", "train.checkpoints_limit", int(made.number("rolling_backup_count", 3)))
    made.drop_all({"rolling_backup_count": "", "rolling_backup": "", "save_skip_first": "", "sample_skip_first": ""})
    samples = made.options.pop("samples", None) or []
    prompts = [str(s["prompt"]) for s in samples if isinstance(s, dict) and s.get("prompt") and s.get("enabled", True)]
    if prompts:
        made.put("validation.prompts", prompts)
        made.put("validation.images", 1)
        _interval(made, "train.validate_every", "sample_after")
    made.drop_all({"sample_after": "there are no samples", "sample_after_unit": "see sample_after"})
    made.drop_all({"validation": "data.held_out keeps a share of the pictures"})
    made.drop_all({"validate_after": "see validation.loss_every", "validate_after_unit": "see validate_after"})


def _interval(made: Account, to: str, *names: str) -> None:
    """How often something is done: by steps or epochs, not by the clock."""
    units = {name: made.text(f"{name}_unit") for name in names}
    common.interval(made, to, {name: unit == "EPOCH" for name, unit in units.items() if unit in {"STEP", "EPOCH"}})
    for name in names:
        made.drop_all({name: f"set {to}, in steps or epochs", f"{name}_unit": f"see {name}"})
