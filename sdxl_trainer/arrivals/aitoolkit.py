"""Jobs of ai-toolkit (YAML or JSON)."""

from pathlib import Path
from typing import Any

from sdxl_trainer.arrivals import common
from sdxl_trainer.arrivals.account import Account
from sdxl_trainer.arrivals.kohya_network import BLOCKS, TEXT, TRANSFORMERS
from sdxl_trainer.errors import UserError

_CACHED = "latents and embeddings are always cached on disk, and nothing that is drawn is frozen by it"
_DATA = {
    "flip_x": "flip",
    "caption_dropout_rate": "caption_dropout",
    "shuffle_tokens": "shuffle_tags",
    "token_dropout_rate": "tag_dropout",
    "default_caption": "caption",
    "trigger_word": "trigger",
}
_DATA_DROPPED = {
    "random_scale": "pictures are scaled to cover their bucket",
    "flip_y": "pictures are not turned upside down",
    "augments": "colours are not changed",
    "augmentations": "colours are not changed",
    "random_triggers": "one trigger",
    "control_path": "no control pictures",
    "network_weight": "the adapter works at its full strength",
    "mask_path": 'masks of another folder are not read: set mask = "file", with a-masklabel.png beside a.jpg',
    "mask_min_value": "set unmasked_weight, once masks lie beside the pictures",
    "num_workers": "train.workers",
    "prefetch_factor": "train.workers",
    "num_frames": "pictures have one frame",
    "shrink_video_to_frames": "pictures have one frame",
    "fps": "pictures have one frame",
    "type": "pictures",
}
_TRAIN = {
    "steps": "train.steps",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "max_grad_norm": "train.max_grad_norm",
    "noise_offset": "objective.noise_offset",
}
_TRAIN_ANYWAY = {
    "sdp": "attention is PyTorch's (model.attention)",
    "xformers": "attention is PyTorch's, as fast or faster",
    "attention_backend": "attention is PyTorch's",
    "unload_text_encoder": "encoders leave memory once captions are encoded",
    "cache_text_embeddings": _CACHED,
    "skip_first_sample": "validation.at_start is off",
    "disable_sampling": "no prompts",
}
_TRAIN_DROPPED = {
    "noise_scheduler": "the base's own noise schedule",
    "timestep_type": "of flow models; for SDXL all timesteps are drawn equally often",
    "linear_timesteps": "of flow models",
    "linear_timesteps2": "of flow models",
    "bypass_guidance_embedding": "of flow models",
    "do_differential_guidance": "no such target",
    "differential_guidance_scale": "no such target",
    "diff_output_preservation": "add a data set with regularisation and prior_prediction, and the class as caption",
    "diff_output_preservation_class": "the caption of that data set",
    "diff_output_preservation_multiplier": "the weight of that data set",
    "blank_prompt_preservation": "add a data set with regularisation, prior_prediction and caption_dropout = 1.0",
    "blank_prompt_preservation_multiplier": "the weight of that data set",
    "learnable_snr_gos": "the weights of timesteps are not learned",
    "merge_network_on_save": "sdxl convert BASE DST --lora ADAPTER merges it",
    "force_consistent_noise": "noise is drawn anew each time",
    "force_first_sample": "set validation.at_start",
    "switch_boundary_every": "of models in several stages",
}
_SAMPLE = {"width": "width", "height": "height", "seed": "seed", "guidance_scale": "guidance", "sample_steps": "steps"}
_TYPES = {"float16": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32"}


def account(path: Path, tree: dict[str, Any]) -> Account:
    """Account for a job's options. UserError for jobs that train something else."""
    config = tree.get("config")
    config = config if isinstance(config, dict) else {}
    processes = config.get("process")
    process = processes[0] if isinstance(processes, list) and processes else None
    if not isinstance(process, dict):
        fix = "give the config of a training, with config.process"
        raise UserError("this is no job of ai-toolkit", str(path), fix)
    made = Account({k: v for k, v in tree.items() if k not in {"config", "meta"}}, str(path))
    made.unused("job")
    named = made.inner({k: v for k, v in config.items() if k != "process"}, "config")
    whole = made.inner(process, "process")
    _refuse_others(whole, path)
    parts = {name: whole.inner(_table(whole, name), name) for name in ("model", "network", "save", "train", "sample")}
    trigger = whole.text("trigger_word")
    _model(parts["model"])
    _output(named, whole, parts["save"])
    for index, entry in enumerate(whole.options.pop("datasets", [])):
        if isinstance(entry, dict):
            _data(whole.inner(entry, f"datasets.{index}"), index, trigger, parts["train"])
    if "data" not in made.tree:
        raise UserError("the job names no pictures", str(path), "add datasets to it")
    whole.part("trigger_word", "data.trigger")
    common.left_out_captions(whole)
    _train(parts["train"], parts["network"], made.tree)
    _network(parts["network"], parts["train"])
    _sample(parts["sample"], trigger)
    whole.do_anyway({"type": "a training", "device": "accelerate decides", "performance_log_every": "metrics.jsonl"})
    whole.drop_all({"logging": "metrics.jsonl; see [log]", "sqlite_db_path": "no database", "meta": "see [export]"})
    for part in (named, *parts.values(), whole, made):
        part.finish()
    return made


def _table(whole: Account, name: str) -> dict[str, Any]:
    found = whole.options.pop(name, None)
    return found if isinstance(found, dict) else {}


def _refuse_others(whole: Account, path: Path) -> None:
    model = whole.options.get("model") or {}
    arch = str(model.get("arch", "") or "").lower()
    others = [n for n in model if n.startswith("is_") and model[n] and n not in {"is_xl", "is_v_pred"}]
    if others or (arch and arch not in {"sdxl", "xl"}):
        what = f"this job trains {arch or others[0].removeprefix('is_')}, not SDXL"
        raise UserError(what, str(path), "give a job for SDXL (model.arch: sdxl)")
    if not arch and not model.get("is_xl"):
        whole.assumed("model.path", str(model.get("name_or_path")), "the job does not say what it is: taken for SDXL")


def _model(model: Account) -> None:
    model.kept("name_or_path", "model.path", model.text("name_or_path"))
    if model.has("vae_path"):
        model.kept("vae_path", "model.vae", model.text("vae_path"))
    if model.look("is_v_pred"):
        model.kept("is_v_pred", "objective.prediction", "v_prediction")
    if model.look("quantize"):
        model.kept("quantize", "train.frozen", "fp8" if "float8" in model.text("qtype", "qfloat8") else "int8")
        model.part("qtype", "train.frozen")
    model.do_anyway({"arch": "SDXL", "is_xl": "SDXL"})
    model.unused("quantize_te", "qtype")
    model.drop_all({"low_vram": "decided by the package"})
    model.drop_all({"qtype_te": "encoders leave memory once captions are encoded", "dtype": "train.precision"})
    model.drop_all({"model_kwargs": "nothing reads them", "compile": "decided by the package"})


def _output(named: Account, whole: Account, save: Account) -> None:
    name, folder = named.text("name", "run"), whole.text("training_folder", "output")
    named.kept("name", "export.name", name)
    place = str(Path(folder) / name)
    if whole.has("training_folder"):
        whole.changed("training_folder", "output_dir", place, "a run has a folder of its own, as there")
    whole.put("output_dir", place)
    save.put("export.formats", ["single"] if save.text("save_format") == "diffusers" else [])
    save.drop_all({"save_format": "diffusers' files are always written; see export.formats"})
    if save.text("dtype") in _TYPES:
        save.kept("dtype", "export.dtype", _TYPES[save.text("dtype")])
    save.keep_all({"save_every": "train.checkpoint_every", "max_step_saves_to_keep": "train.checkpoints_limit"})
    save.keep_all({"push_to_hub": "hub.push", "hf_repo_id": "hub.id", "hf_private": "hub.private"})


def _data(data: Account, index: int, trigger: str | None, train: Account) -> None:
    to = f"data.{index}."
    place = "folder_path" if data.has("folder_path") else "dataset_path"
    if not data.has(place):
        raise UserError(f"{data.place}folder_path is missing", data.where, "name the folder of the pictures")
    data.kept(place, f"{to}path", data.text(place))
    given = data.options.get("resolution", 512)
    sides = [int(side) for side in (given if isinstance(given, list) else [given])]
    largest = max(sides)
    rest = [side for side in sides if side != largest]
    if "resolution" in data.options:
        data.kept("resolution", f"{to}resolution", largest)
    else:
        data.assumed(f"{to}resolution", largest, "the default there")
    if rest:
        data.put(f"{to}more_resolutions", rest)
    if data.look("buckets", True):
        data.assumed(f"{to}buckets", "area", "buckets are on there unless told otherwise")
        data.assumed(f"{to}no_upscale", True, "pictures are never enlarged there")
        if data.has("bucket_tolerance"):
            data.kept("bucket_tolerance", f"{to}bucket_step")
    data.drop_all({"buckets": "", "bucket_tolerance": "there are no buckets"})
    if data.has("num_repeats"):
        data.kept("num_repeats", f"{to}repeats", float(data.number("num_repeats")))
    data.keep_all({name: to + option for name, option in _DATA.items()})
    if trigger and "trigger" not in data.tree["data"][index]:
        data.put(f"{to}trigger", trigger)
    if data.look("random_crop"):
        data.kept("random_crop", f"{to}crop", "random")
    if data.look("alpha_mask"):
        data.kept("alpha_mask", f"{to}mask", "alpha")
    _kinds(data, to, train)
    _words(data, index)
    data.do_anyway(dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_embeddings"), _CACHED))
    data.drop_all(_DATA_DROPPED)
    data.finish()


def _kinds(data: Account, to: str, train: Account) -> None:
    """Regularisation pictures, and weights."""
    if data.look("is_reg"):
        data.kept("is_reg", f"{to}regularisation", True)
        data.put(f"{to}weight", float(train.number("reg_weight", 1.0)))
        train.part("reg_weight", "data.weight of the regularisation pictures")
    if data.has("loss_multiplier"):
        data.kept("loss_multiplier", f"{to}weight", float(data.number("loss_multiplier")))
    if data.look("prior_reg"):
        data.kept("prior_reg", f"{to}prior_prediction", True)


def _words(data: Account, index: int) -> None:
    made = data.tree["data"][index]
    if (made.get("shuffle_tags") or made.get("tag_dropout")) and data.has("keep_tokens"):
        keep = int(data.number("keep_tokens"))
        data.changed("keep_tokens", f"data.{index}.keep_tags", keep, "kept when shuffling too")
    data.unused("keep_tokens")
    if data.text("caption_ext", "txt").lstrip(".") in {"txt", "caption"}:
        data.part("caption_ext", ".txt and .caption files are read")
    elif data.has("caption_ext"):
        data.kept("caption_ext", f"data.{index}.caption_extension", data.text("caption_ext"))


def _train(train: Account, network: Account, tree: dict[str, Any]) -> None:
    micro = int(train.number("batch_size", 1))
    times = int(train.number("gradient_accumulation_steps", 1)) * int(train.number("gradient_accumulation", 1))
    train.put("train.micro_batch", micro)
    train.put("train.batch_size", micro * times)
    if train.has("batch_size") and times > 1:
        train.changed("batch_size", "train.batch_size", micro * times, f"of an optimizer step: {micro} x {times}")
    elif train.has("batch_size"):
        train.kept("batch_size", "train.batch_size", micro)
    for name in ("gradient_accumulation_steps", "gradient_accumulation"):
        train.part(name, "train.batch_size, beside train.micro_batch")
    if not train.has("steps"):
        train.assumed("train.steps", 1000, "the default there")
    _rate(train)
    if train.text("dtype") in _TYPES:
        train.kept("dtype", "train.precision", _TYPES[train.text("dtype")])
    _timesteps(train)
    average = train.inner(train.options.pop("ema_config", None) or {}, "ema_config")
    if average.look("use_ema"):
        average.keep_all({"use_ema": "ema.enabled", "ema_decay": "ema.decay"})
    average.unused("use_ema", "ema_decay")
    average.finish()
    train.do_anyway(_TRAIN_ANYWAY)
    train.drop_all(_TRAIN_DROPPED)
    train.keep_all(_TRAIN)


def _rate(train: Account) -> None:
    """The optimizer, and the learning rate over the run."""
    arguments = train.options.pop("optimizer_params", None) or {}
    name = common.optimizer(train, "optimizer", train.text("optimizer", "adamw"), dict(arguments), "optimizer_params")
    rate = "lr" if "lr" in train.options or not train.has("unet_lr") else "unet_lr"
    common.learning_rate(train, rate, float(train.number(rate, 1e-6)), name)
    parameters = train.inner(train.options.pop("lr_scheduler_params", None) or {}, "lr_scheduler_params")
    warmup = parameters.number("num_warmup_steps")
    common.schedule(train, "lr_scheduler", train.text("lr_scheduler", "constant"), ("num_warmup_steps", None), None)
    if warmup:
        parameters.kept("num_warmup_steps", "schedule.warmup_steps", int(warmup))
        if train.tree.get("schedule", {}).get("name", "constant") == "constant":
            train.put("schedule.name", "constant_with_warmup")
    parameters.do_anyway({"total_iters": "the whole run"})
    parameters.drop_all({"min_lr": "the learning rate ends at 0", "eta_min": "the learning rate ends at 0"})
    parameters.finish()


def _timesteps(train: Account) -> None:
    for gamma in ("min_snr_gamma", "snr_gamma"):
        if train.has(gamma):
            train.kept(gamma, "objective.snr_gamma", float(train.number(gamma)))
    kind = train.text("content_or_style", "balanced")
    if kind in {"content", "style"}:
        train.kept("content_or_style", "timesteps.density", {"content": "cubic", "style": "cubic_earlier"}[kind])
    train.do_anyway({"content_or_style": "all timesteps are drawn equally often"})
    least, most = train.number("min_denoising_steps", 0), train.number("max_denoising_steps", 999)
    if least > 0 or most < 999:
        # They count from the noisy end there.
        bounds = {"begin": 999 - int(most), "end": 1000 - int(least)}
        for option, value in {"bias": "range", **bounds, "multiplier": 1e9}.items():
            train.put(f"timesteps.{option}", value)
    for bound in ("min_denoising_steps", "max_denoising_steps"):
        train.part(bound, "timesteps.begin and end, counted from the clean end")
    if train.text("loss_type", "mse") != "mse":
        train.dropped("loss_type", "the squared error; see objective.loss")
    train.do_anyway({"loss_type": "the squared error"})


def _network(network: Account, train: Account) -> None:
    text = bool(train.look("train_text_encoder"))
    parts = ["unet", "text_encoder", "text_encoder_2"] if text else ["unet"]
    if not train.look("train_unet", True):
        parts = parts[1:]
    train.part("train_text_encoder", f"models that learn: {', '.join(parts)}")
    train.part("train_unet", f"models that learn: {', '.join(parts)}")
    base = train.tree["train"]["learning_rate"]
    rates = {part: float(train.number("text_encoder_lr" if "text" in part else "unet_lr", base)) for part in parts}
    if len(set(rates.values())) > 1 and train.tree["optimizer"]["name"] != "prodigy":
        train.tree["learn"] = [{"match": rf"{part}\..*", "learning_rate": rate} for part, rate in rates.items()]
    for option in ("unet_lr", "text_encoder_lr"):
        train.part(option, "learn, a rule for each model")
    if not network.options:
        if text and "learn" not in train.tree:
            train.tree["learn"] = [{"match": rf"{part}\..*"} for part in parts]
        return
    kind = network.text("type", "lora").lower()
    if kind not in {"lora", "locon", "lokr", "dora", "loha"}:
        raise UserError(f"the network '{kind}' is not available here", network.where, "lora, locon, dora, lokr, loha")
    network.kept("type", "adapter.kind", "lora" if kind == "locon" else kind)
    network.put("adapter.parts", parts)
    rank = "rank" if network.has("rank") else "linear"
    _ranks(network, rank)
    conv = network.number("conv")
    chosen = BLOCKS if conv else TRANSFORMERS
    if conv:
        network.kept("conv", "adapter.conv_rank", int(conv))
        network.put("adapter.conv_alpha", float(network.number("conv_alpha", conv)))
        network.part("conv_alpha", "adapter.conv_alpha")
    wanted = [chosen] * ("unet" in parts) + [TEXT] * text
    network.put("adapter.targets", wanted[0] if len(wanted) == 1 else f"({'|'.join(wanted)})")
    if network.has("dropout"):
        network.kept("dropout", "adapter.dropout", float(network.number("dropout")))
    if network.has("pretrained_lora_path"):
        network.kept("pretrained_lora_path", "adapter.start", network.text("pretrained_lora_path"))
    if kind == "lokr":
        network.options.setdefault("lokr_full_rank", True)  # the default there
        common.kronecker(network, network, "lokr_factor", "lokr_full_rank")
    network.drop_all({"lokr_factor": "of LoKr alone", "lokr_full_rank": "of LoKr alone"})
    network.drop_all({"network_kwargs": "layers are chosen by adapter.targets", "conv_alpha": "no convolutions"})
    network.drop_all({"transformer_only": "of other models"})
    network.drop_all({"old_lokr_format": "see sdxl convert", "split_multistage_loras": "of other models"})
    if "export" in network.tree and not network.tree["export"].get("formats"):
        network.put("export.formats", ["kohya"])


def _ranks(network: Account, rank: str) -> None:
    if network.has(rank):
        network.kept(rank, "adapter.rank", int(network.number(rank)))
    else:
        network.assumed("adapter.rank", 4, "the default there")
    alpha = "linear_alpha" if network.has("linear_alpha") else "alpha"
    if network.has(alpha):
        network.kept(alpha, "adapter.alpha", float(network.number(alpha)))
    else:
        network.assumed("adapter.alpha", 1.0, "the default there")
    network.drop_all({"linear": "rank has the last word", "alpha": "linear_alpha has the last word"})


def _sample(sample: Account, trigger: str | None) -> None:
    prompts = sample.options.get("prompts") or [s.get("prompt") for s in sample.options.get("samples") or []]
    words = [str(prompt).replace("[trigger]", trigger or "") for prompt in prompts if prompt]
    names = ("prompts", "samples", "sample_every", *_SAMPLE, "neg")
    if not words:
        sample.drop_all(dict.fromkeys(names, "there are no prompts"))
    else:
        sample.kept("prompts" if sample.has("prompts") else "samples", "validation.prompts", words)
        sample.put("validation.images", 1)
        sample.keep_all({"sample_every": "train.validate_every", "seed": "validation.seed"})
        sample.keep_all({name: f"validation.{option}" for name, option in _SAMPLE.items() if option != "guidance"})
        if sample.has("guidance_scale"):
            sample.kept("guidance_scale", "validation.guidance", float(sample.number("guidance_scale")))
        if sample.has("neg"):
            sample.kept("neg", "validation.negative", sample.text("neg"))
    sample.drop_all({"sampler": "previews are drawn with Euler's method", "walk_seed": "each picture has its own seed"})
    sample.drop_all(
        {"num_frames": "pictures have one frame", "fps": "pictures have one frame", "samples": "see prompts"}
    )
    sample.drop_all({"sample_start_step": "from the first on", "format": "PNG", "guidance_rescale": "not done"})
