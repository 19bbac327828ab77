"""Configs of kohya's sd-scripts: a TOML or a command line, with a dataset TOML or folders named 10_words."""

import re
from pathlib import Path
from typing import Any

from sdxl_trainer.arrivals import common, kohya_data, kohya_network, reading
from sdxl_trainer.arrivals.account import Account, pairs, plain
from sdxl_trainer.errors import plural

SCRIPTS = ("sdxl_train.py", "sdxl_train_network.py", "sdxl_train_textual_inversion.py")
_KEPT = {
    "pretrained_model_name_or_path": "model.path",
    "seed": "seed",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "max_grad_norm": "train.max_grad_norm",
    "min_snr_gamma": "objective.snr_gamma",
    "noise_offset": "objective.noise_offset",
    "noise_offset_random_strength": "objective.noise_offset_random",
    "adaptive_noise_scale": "objective.noise_offset_adaptive",
    "multires_noise_discount": "objective.pyramid_discount",
    "ip_noise_gamma": "objective.input_perturbation",
    "ip_noise_gamma_random_strength": "objective.input_perturbation_random",
    "zero_terminal_snr": "objective.zero_terminal_snr",
    "huber_c": "objective.delta",
    "huber_schedule": "objective.delta_schedule",
    "vae_batch_size": "cache.batch_size",
    "text_encoder_batch_size": "cache.text_batch_size",
    "sample_at_first": "validation.at_start",
    "metadata_author": "export.author",
    "metadata_description": "export.description",
    "metadata_license": "export.license",
    "metadata_trigger_phrase": "export.trigger",
    "huggingface_repo_id": "hub.id",
}
_ALWAYS = "latents and embeddings are always cached on disk, and nothing that is drawn is frozen by it"
_ANYWAY = {
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs"), _ALWAYS),
    **dict.fromkeys(("cache_text_encoder_outputs_to_disk", "skip_cache_check"), _ALWAYS),
    "no_half_vae": "the VAE encodes in fp32 (cache.vae_precision)",
    "clip_skip": "the last layer but one is read: for SDXL the option is not looked at there",
    "sdpa": "attention is PyTorch's (model.attention)",
    "mem_eff_attn": "attention is PyTorch's, which needs no more memory",
    "xformers": "attention is PyTorch's, as fast or faster (model.attention)",
    "diffusers_xformers": "attention is PyTorch's, as fast or faster (model.attention)",
    "persistent_data_loader_workers": "threads read ahead (train.workers)",
    "save_state": "checkpoints always hold the whole state",
    "save_state_on_train_end": "checkpoints always hold the whole state",
    "use_safetensors": "always",
    "disable_mmap_load_safetensors": "decided by the loader",
    "skip_until_initial_step": "a resumed run always goes on with the very next pictures",
    "huggingface_repo_type": "a model",
    "generate_caption_database": "captions are read where they are",
    "lowram": "decided by the loader",
    "highvram": "decided by the loader",
}
_DROPPED = {
    "full_fp16": "weights that learn are fp32 or bf16",
    "torch_compile": "decided by the package",
    "dynamo_backend": "decided by the package",
    "fused_backward_pass": "train.fused_backward, which clips by the norm of all tensors, in a pass more",
    "fused_optimizer_groups": "train.fused_backward, which clips by the norm of all tensors, in a pass more",
    "blocks_to_swap": "not for SDXL there either",
    "save_last_n_epochs_state": "checkpoints always hold the whole state: train.checkpoints_limit",
    "save_last_n_steps_state": "checkpoints always hold the whole state: train.checkpoints_limit",
    "epoch": "of the window, which makes max_train_steps of it",
    "noise_offset_type": "of the window, which gives the options of that type alone",
    "resume": "a state of sd-scripts cannot be continued; adapter.start begins with an adapter's weights",
    "initial_epoch": "a run begins at its beginning",
    "initial_step": "a run begins at its beginning",
    "sample_sampler": "previews are drawn with Euler's method",
    "log_prefix": "the folder of a run is its name",
    "log_tracker_config": "nothing reads it",
    "wandb_run_name": "the folder of a run is its name",
    "wandb_api_key": "log in with: wandb login",
    "huggingface_token": "log in with: hf auth login",
    "tokenizer_cache_dir": "tokenizers come with the model",
    "training_comment": "export.description goes into the file",
    "stop_text_encoder_training": "learn: until, the share of the run after which a rule stops",
    "config_file": "read",
    "output_config": "nothing is written but the result",
    "debug_dataset": "see sdxl check",
    "v_pred_like_loss": "no such term of the loss",
    "huber_scale": "the loss is not multiplied: change the learning rate",
    "lr_scheduler_min_lr_ratio": "the learning rate ends at 0",
    "lr_scheduler_timescale": "no such schedule",
    "lr_scheduler_args": "schedules have the options of [schedule]",
    "ddp_timeout": "set by the launcher",
    "ddp_gradient_as_bucket_view": "decided by accelerate",
    "ddp_static_graph": "decided by accelerate",
    "deepspeed": "accelerate config decides",
    "max_validation_steps": "all held-out pictures are measured",
    "async_upload": "uploaded at the end",
    "huggingface_path_in_repo": "the whole result is uploaded",
    "save_state_to_huggingface": "checkpoints stay here",
    "resume_from_huggingface": "checkpoints stay here",
    "metadata_tags": "sdxl convert --set tags=… writes them",
    "metadata_title": "the name of the file (export.name)",
    "metadata_usage_hint": "sdxl convert --set usage_hint=… writes it",
}
_PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
_TYPES = {"float": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}


def fill(
    account: Account, data: dict[str, Any] | None, script: str = "", launcher: dict[str, Any] | None = None
) -> None:
    """Account for a config's options."""
    _model(account)
    batch = kohya_data.datasets(account, data)
    kohya_data.prior_weight(account)
    common.left_out_captions(account)
    _batch(account, batch, launcher or {})
    steps = _length(account)
    rate = float(account.number("learning_rate", 2e-6))
    optimizer = _optimizer(account, rate)
    rate = account.tree["train"]["learning_rate"]
    kohya_network.learns(account, script, rate)
    if optimizer == "prodigy":
        _one_rate(account)
    _schedule(account, steps)
    _objective(account)
    _computing(account, launcher or {})
    _saving(account)
    _previews(account)
    names = {"validate_every_n_steps": False, "validate_every_n_epochs": True}
    common.interval(account, "validation.loss_every", names)
    account.keep_all(_KEPT)
    account.do_anyway(_ANYWAY)
    account.drop_all(_DROPPED)
    account.finish()


def _model(account: Account) -> None:
    if account.has("vae"):
        vae = account.text("vae")
        if Path(vae).suffix in {".safetensors", ".ckpt", ".pt"}:
            account.dropped("vae", "a VAE is a diffusers folder or hub id here; the base's own is used")
        else:
            account.kept("vae", "model.vae", vae)


def _batch(account: Account, batch: int, launcher: dict[str, Any]) -> None:
    """Pictures of an optimizer step: batch x accumulation x processes."""
    processes = int(plain(launcher.get("num_processes", 1)))
    own, accumulation = (
        int(account.number("train_batch_size", 1)),
        int(account.number("gradient_accumulation_steps", 1)),
    )
    micro = batch or own
    total = micro * accumulation * processes
    words = [f"{micro}", f"{accumulation} of accumulation"] + ([f"{processes} processes"] if processes > 1 else [])
    account.put("train.micro_batch", micro)
    if batch and account.has("train_batch_size"):
        account.dropped("train_batch_size", "the data sets' own batch_size has the last word there")
    why = f"pictures of an optimizer step: {' x '.join(words)}; pictures of a pass are train.micro_batch"
    if account.has("train_batch_size") and total == own:
        account.kept("train_batch_size", "train.batch_size", total)
    elif account.has("train_batch_size"):
        account.changed("train_batch_size", "train.batch_size", total, why)
    account.part("gradient_accumulation_steps", "train.batch_size, beside train.micro_batch")
    account.put("train.batch_size", total)


def _length(account: Account) -> int | None:
    """Steps if they are known, after putting steps or epochs."""
    epochs, steps = account.number("max_train_epochs"), account.number("max_train_steps")
    if epochs:
        account.kept("max_train_epochs", "train.epochs", int(epochs))
        account.drop_all({"max_train_steps": "max_train_epochs has the last word", "max_train_epochs": ""})
        return None
    if steps:
        account.kept("max_train_steps", "train.steps", int(steps))
    else:
        account.assumed("train.steps", 1600, "the default of max_train_steps")
    account.drop_all({"max_train_steps": "", "max_train_epochs": ""})
    return int(steps or 1600)


def _optimizer(account: Account, rate: float) -> str:
    option, given = "optimizer_type", account.text("optimizer_type", "AdamW")
    for switch, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if account.look(switch):
            option, given = switch, name
    arguments = pairs(account.options.pop("optimizer_args", None), account.where)
    if given.lower() == "adafactor" and arguments.get("relative_step", True):
        account.assumed("train.learning_rate", rate, "relative_step is on there and the rate not looked at; here it is")
    name = common.optimizer(account, option, given, arguments, "optimizer_args")
    common.learning_rate(account, "learning_rate", rate, name)
    account.drop_all({"use_8bit_adam": "", "use_lion_optimizer": ""})
    return name


def _one_rate(account: Account) -> None:
    """Prodigy finds one rate for everything that learns."""
    if account.tree.pop("learn", None):
        account.amended("train.learning_rate", 1.0, "Prodigy finds one rate for UNet and text encoders together")
    elif account.tree["train"]["learning_rate"] < 0.1:
        account.amended("train.learning_rate", 1.0, "it multiplies the rate that Prodigy finds")


def _schedule(account: Account, steps: int | None) -> None:
    given = account.text("lr_scheduler", "constant")
    if account.has("lr_scheduler_type"):
        account.dropped("lr_scheduler_type", f"schedules of other packages are not used: {given}")
    if account.tree["optimizer"]["name"] == "schedulefree" and given not in {"constant", "constant_with_warmup"}:
        account.changed("lr_scheduler", "schedule.name", "constant", "schedule-free has no schedule, there neither")
        given = "constant"
    warmup = ("lr_warmup_steps", account.number("lr_warmup_steps", 0))
    common.schedule(account, "lr_scheduler", given, warmup, steps)
    if given == "warmup_stable_decay" and account.has("lr_decay_steps"):
        decay = account.number("lr_decay_steps")
        count = int(decay if decay >= 1 else decay * (steps or 0))
        account.kept("lr_decay_steps", "schedule.cooldown_steps", count)
    account.drop_all({"lr_decay_steps": f"{given} has no such part"})
    if given == "cosine_with_restarts" and account.has("lr_scheduler_num_cycles"):
        account.kept("lr_scheduler_num_cycles", "schedule.cycles")
    if given == "polynomial" and account.has("lr_scheduler_power"):
        account.kept("lr_scheduler_power", "schedule.power", float(account.number("lr_scheduler_power")))
    account.drop_all(dict.fromkeys(("lr_scheduler_num_cycles", "lr_scheduler_power"), f"{given} does not look at it"))


def _objective(account: Account) -> None:
    _prediction(account)
    _loss(account)
    common.pyramid(account)
    least, most = account.number("min_timestep", 0) or 0, account.number("max_timestep", 1000) or 1000
    if least > 0 or most < 1000:
        account.put("timesteps", {"bias": "range", "begin": int(least), "end": int(most), "multiplier": 1e9})
        for name in ("min_timestep", "max_timestep"):
            account.part(name, "timesteps.bias = range: a billion times as often as the others")
    account.do_anyway({"min_timestep": "", "max_timestep": "all timesteps"})
    length = account.number("max_token_length")
    if length and length > 75:
        account.kept("max_token_length", "text.max_chunks", int(length) // 75)
        account.put("text.long_captions", "kohya")
    else:
        account.do_anyway({"max_token_length": "text.long_captions = cut"})
        account.assumed("text.long_captions", "cut", "longer captions are cut after 75 tokens there")
    if account.look("weighted_captions"):
        account.kept("weighted_captions", "text.emphasis", "a1111_no_norm")
        for data in account.tree["data"]:
            data["emphasis"] = True


def _prediction(account: Account) -> None:
    """What is predicted, and how timesteps are weighted."""
    if account.look("v_parameterization"):
        account.kept("v_parameterization", "objective.prediction", "v_prediction")
        if account.look("scale_v_pred_loss_like_noise_pred"):
            if account.has("min_snr_gamma"):
                account.dropped("scale_v_pred_loss_like_noise_pred", "min_snr_gamma weights the timesteps alone")
            else:
                account.kept("scale_v_pred_loss_like_noise_pred", "objective.weighting", "epsilon")
    else:
        account.drop_all({"scale_v_pred_loss_like_noise_pred": "the model does not predict v"})
    if account.look("debiased_estimation_loss"):
        account.drop_all({"min_snr_gamma": "debiased_estimation_loss weights the timesteps alone"})
        account.kept("debiased_estimation_loss", "objective.weighting", "debiased")


def _loss(account: Account) -> None:
    loss = account.text("loss_type", "l2").lower()
    if loss == "l1":
        why = "smooth-L1 with a corner at 0.001, twice the absolute error"
        account.changed("loss_type", "objective.loss", "smooth_l1", why)
        account.put("objective.delta", 1e-3)
        account.put("objective.delta_schedule", "constant")
    elif account.has("loss_type"):
        account.kept("loss_type", "objective.loss", loss)
    if loss in {"l1", "l2"}:
        account.unused("huber_c", "huber_schedule", "huber_scale")


def _computing(account: Account, launcher: dict[str, Any]) -> None:
    given = account.text("mixed_precision") or str(launcher.pop("mixed_precision", "no"))
    precision = _PRECISIONS.get(given, "auto")
    adapts = "adapter" in account.tree or "token" in account.tree
    if account.has("mixed_precision"):
        account.kept("mixed_precision", "train.precision", precision)
    else:
        account.assumed("train.precision", precision, "that of the launcher, or mixed_precision's default")
    if account.look("full_bf16") and adapts:
        account.dropped("full_bf16", "adapters are always fp32; the base beside them is in the compute type")
    elif account.look("full_bf16"):
        account.kept("full_bf16", "train.weights", "bf16")
        account.put("train.precision", "bf16")
        if account.tree["optimizer"]["name"] == "adamw":
            account.amended("optimizer.name", "adamw_bf16", "rounds bf16 weights by chance, so that small steps count")
    for name in ("fp8_base", "fp8_base_unet"):
        if account.look(name) and adapts:
            account.kept(name, "train.frozen", "fp8")
        else:
            account.drop_all({name: "the whole model learns"})
    name = "max_data_loader_n_workers"
    if account.has(name) and (count := int(account.number(name))) > 16:
        account.changed(name, "train.workers", 16, "threads that read cached rows, at most 16")
    elif account.has(name):
        account.kept(name, "train.workers", count)
    options = account.inner(launcher, "accelerate")
    options.do_anyway(dict.fromkeys(list(options.options), "accelerate launch takes it here too"))


def _saving(account: Account) -> None:
    """Where results go, and how often."""
    _place(account)
    adapts = "adapter" in account.tree
    if account.text("save_model_as") == "diffusers" and not adapts:
        account.part("save_model_as", "always written")
        account.tree.get("export", {}).pop("name", None)
    elif "token" not in account.tree:
        account.put("export.formats", ["kohya" if adapts else "single"])
        account.part("save_model_as", "export.formats: .safetensors, and diffusers' files beside it")
    if account.text("save_precision") in _TYPES:
        account.kept("save_precision", "export.dtype", _TYPES[account.text("save_precision")])
    if account.look("no_metadata"):
        account.kept("no_metadata", "export.metadata", "none")
    _often(account)
    if account.has("logging_dir") or account.has("log_with"):
        given = account.text("log_with", "tensorboard")
        account.put("log.trackers", ["tensorboard", "wandb"] if given == "all" else [given])
        account.part("log_with", "log.trackers")
        account.do_anyway({"logging_dir": "log.dir, in the run's own folder"})
    if account.has("log_tracker_name"):
        account.kept("log_tracker_name", "log.project", account.text("log_tracker_name"))
    if account.has("huggingface_repo_id"):
        account.put("hub.push", True)
        if account.has("huggingface_repo_visibility"):
            private = account.text("huggingface_repo_visibility") != "public"
            account.kept("huggingface_repo_visibility", "hub.private", private)


def _place(account: Account) -> None:
    """The folder, and the name of the file."""
    name, folder = account.text("output_name"), account.text("output_dir", "runs")
    if name:
        name = re.sub(r"[\\/]", "-", name)
        account.kept("output_name", "export.name", name)
        why = "a run has a folder of its own, for its checkpoints and records"
        if account.has("output_dir"):
            account.changed("output_dir", "output_dir", str(Path(folder) / name), why)
        account.put("output_dir", str(Path(folder) / name))
    elif account.has("output_dir"):
        account.kept("output_dir", "output_dir", folder)
    else:
        account.assumed("output_dir", folder, "no output_dir is given")


def _often(account: Account) -> None:
    """How often checkpoints are written, and how many stay."""
    ratio, epochs = account.number("save_n_epoch_ratio"), account.tree["train"].get("epochs")
    if ratio and epochs and not account.has("save_every_n_steps"):
        every = plural(int(epochs // ratio) or 1, "epoch")
        account.changed("save_n_epoch_ratio", "train.checkpoint_every", every, f"of {epochs}")
        account.drop_all({"save_every_n_epochs": "save_n_epoch_ratio has the last word"})
    else:
        names = {"save_every_n_steps": False, "save_every_n_epochs": True}
        common.interval(account, "train.checkpoint_every", names)
        account.drop_all({"save_n_epoch_ratio": "a share of max_train_epochs; set train.checkpoint_every"})
    every = account.tree["train"].get("checkpoint_every")
    if isinstance(every, str):
        account.keep_all({"save_last_n_epochs": "train.checkpoints_limit"})
    elif every and account.has("save_last_n_steps"):
        limit = max(1, int(account.number("save_last_n_steps")) // every)
        account.changed("save_last_n_steps", "train.checkpoints_limit", limit, "as many checkpoints as lie in them")
    others = ("save_last_n_epochs", "save_last_n_steps")
    account.drop_all(dict.fromkeys(others, "see train.checkpoint_every"))


_OPTION = re.compile(r"\s--(\w+)\s+([^-]\S*(?:\s+(?!--)\S+)*|-?\d\S*)")
_DRAWN = {"w": "width", "h": "height", "s": "steps", "l": "guidance", "d": "seed", "n": "negative"}


def _previews(account: Account) -> None:
    """The prompts of a file there; what they have in common decides size, steps and seed."""
    if not account.has("sample_prompts"):
        names = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
        account.drop_all(dict.fromkeys(names, "there are no sample_prompts"))
        return
    given = account.text("sample_prompts")
    content = given  # the GUI keeps the prompts themselves
    if "\n" not in given and Path(given).suffix in {".txt", ".toml", ".json"}:
        path = Path(account.where).parent / given
        if path.suffix != ".txt" or not path.is_file():
            account.dropped("sample_prompts", "no such text file here: write them as validation.prompts")
            names = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
            account.drop_all(dict.fromkeys(names, "no prompts"))
            return
        content = reading.text(path)
    lines = [line.strip() for line in content.splitlines() if line.strip() and line.strip()[0] != "#"]
    found = [dict(_OPTION.findall(f" {line}")) for line in lines]
    account.kept("sample_prompts", "validation.prompts", [re.split(r"\s--\w", line)[0].strip() for line in lines])
    account.put("validation.images", 1)
    for flag, option in _DRAWN.items():
        values = {plain(own.get(flag)) for own in found}
        if len(values) == 1 and None not in values:
            value = values.pop()
            account.put(f"validation.{option}", float(value) if option == "guidance" else value)
    common.interval(account, "train.validate_every", {"sample_every_n_epochs": True, "sample_every_n_steps": False})
