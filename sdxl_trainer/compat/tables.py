"""The flags of the Hugging Face SDXL training scripts, and what each of them sets in our config.

Names, types, defaults and choices are the reference's, so that its commands work unchanged; the help is ours. A flag
that several scripts have stands here once.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdxl_trainer.compat.flags import Flag, truth

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")

# In every script.
_SHARED: tuple[Flag, ...] = (
    Flag(
        "--pretrained_model_name_or_path",
        str,
        None,
        "base model: hub id, diffusers folder or one .safetensors file",
        "model.path",
        required=True,
    ),
    Flag(
        "--pretrained_vae_model_name_or_path",
        str,
        None,
        "another VAE: hub id or folder, such as madebyollin/sdxl-vae-fp16-fix",
        "model.vae",
    ),
    Flag("--revision", str, None, "branch, tag or commit of the base model's repository", "model.revision"),
    Flag("--variant", str, None, "file variant of the base model, such as fp16", "model.variant"),
    Flag("--dataset_name", str, None, "hub dataset or local dataset folder"),
    Flag("--dataset_config_name", str, None, "configuration of a hub dataset", "data.0.name"),
    Flag("--image_column", str, "image", "column that holds the picture", "data.0.image_column"),
    Flag("--caption_column", str, "text", "column that holds a caption or a list of them", "data.0.caption_column"),
    Flag("--resolution", int, 1024, "pixels of the shorter side, and of the square crop", "data.0.resolution"),
    Flag("--center_crop", bool, False, "crop in the middle; otherwise anywhere"),
    Flag("--random_flip", bool, False, "mirror half of the time", "data.0.flip"),
    Flag("--image_interpolation_mode", str, "lanczos", "filter that resizes pictures", choices=INTERPOLATIONS),
    Flag("--cache_dir", str, None, "where hub datasets are kept", "cache.datasets_dir"),
    Flag("--dataloader_num_workers", int, 0, "how many workers read the data ahead"),
    Flag("--validation_prompt", str, None, "prompt of the validation pictures"),
    Flag("--num_validation_images", int, 4, "validation pictures at a time", "validation.images"),
    Flag("--validation_epochs", int, 1, "epochs between validation pictures", "validation.every_epochs"),
    Flag("--output_dir", str, "sdxl-model-finetuned", "where everything is written", "output_dir"),
    Flag("--seed", int, None, "seed of every draw; not given: one is chosen and shown", "seed"),
    Flag("--train_batch_size", int, 16, "pictures per forward pass and process", "train.micro_batch"),
    Flag("--gradient_accumulation_steps", int, 1, "forward passes per optimizer step"),
    Flag("--num_train_epochs", int, 100, "passes over the data, unless --max_train_steps is given"),
    Flag("--max_train_steps", int, None, "optimizer steps", "train.steps"),
    Flag("--checkpointing_steps", int, 500, "optimizer steps between checkpoints", "train.checkpoint_every"),
    Flag("--checkpoints_total_limit", int, None, "how many checkpoints to keep", "train.checkpoints_limit"),
    Flag("--resume_from_checkpoint", str, None, "a checkpoint's name or path, or 'latest'"),
    Flag(
        "--gradient_checkpointing",
        bool,
        False,
        "save memory by computing activations twice",
        "train.gradient_checkpointing",
    ),
    Flag(
        "--mixed_precision",
        str,
        None,
        "compute type; not given: what accelerate is configured to",
        choices=("no", "fp16", "bf16"),
    ),
    Flag("--allow_tf32", bool, False, "TensorFloat-32 for fp32 matrix products on NVIDIA", "train.tf32"),
    Flag("--enable_xformers_memory_efficient_attention", bool, False, "attention by xFormers"),
    Flag("--local_rank", int, -1, "set by launchers; the environment decides"),
    Flag("--learning_rate", float, 1e-4, "base learning rate", "train.learning_rate"),
    Flag("--scale_lr", bool, False, "multiply the learning rate by batch size, accumulation and processes"),
    Flag(
        "--lr_scheduler",
        str,
        "constant",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial",
        "schedule.name",
    ),
    Flag("--lr_warmup_steps", int, 500, "optimizer steps of warm-up", "schedule.warmup_steps"),
    Flag("--use_8bit_adam", bool, False, "AdamW with 8-bit state (needs bitsandbytes)"),
    Flag("--adam_beta1", float, 0.9, "decay of AdamW's first moment", "optimizer.betas.0"),
    Flag("--adam_beta2", float, 0.999, "decay of AdamW's second moment", "optimizer.betas.1"),
    Flag("--adam_weight_decay", float, 1e-2, "decoupled weight decay", "optimizer.weight_decay"),
    Flag("--adam_epsilon", float, 1e-08, "added to AdamW's denominator", "optimizer.eps"),
    Flag("--max_grad_norm", float, 1.0, "longest gradient, over all tensors", "train.max_grad_norm"),
    Flag("--snr_gamma", float, None, "Min-SNR gamma; 5.0 is usual", "objective.snr_gamma"),
    Flag("--logging_dir", str, "logs", "folder of the trackers, in output_dir", "log.dir"),
    Flag("--report_to", str, "tensorboard", "trackers: tensorboard, wandb, ..., all, none, or a list with commas"),
    Flag("--push_to_hub", bool, False, "upload the result to the Hugging Face hub", "hub.push"),
    Flag("--hub_token", str, None, "token for the upload; kept out of every file"),
    Flag("--hub_model_id", str, None, "repository of the upload; not given: the name of output_dir", "hub.id"),
)

NOISE_OFFSET = Flag("--noise_offset", float, 0, "constant added to the noise of each channel", "objective.noise_offset")

# In the two that train on pictures with captions.
_CAPTIONED: tuple[Flag, ...] = (
    Flag("--train_data_dir", str, None, "folder of pictures; with --dataset_name: a folder inside that dataset"),
    Flag("--max_train_samples", int, None, "train on this many pictures, drawn with the seed", "data.0.max_samples"),
    Flag(
        "--prediction_type",
        str,
        None,
        "epsilon, v_prediction or sample; not given: the base model's",
        "objective.prediction",
    ),
    Flag("--enable_npu_flash_attention", bool, False, "attention by the flash kernel of Ascend NPUs"),
    NOISE_OFFSET,
)

# In the full fine-tuning alone.
_FULL: tuple[Flag, ...] = (
    Flag(
        "--proportion_empty_prompts", float, 0, "how often a caption is left out, from 0 to 1", "data.0.caption_dropout"
    ),
    Flag("--use_ema", bool, False, "keep a moving average of the weights", "ema.enabled"),
    Flag(
        "--timestep_bias_strategy",
        str,
        "none",
        "which timesteps are drawn more often",
        "timesteps.bias",
        choices=("earlier", "later", "range", "none"),
    ),
    Flag("--timestep_bias_multiplier", float, 1.0, "how much more often", "timesteps.multiplier"),
    Flag("--timestep_bias_begin", int, 0, "first timestep of range", "timesteps.begin"),
    Flag("--timestep_bias_end", int, 1000, "timestep after the last of range", "timesteps.end"),
    Flag("--timestep_bias_portion", float, 0.25, "share that earlier and later favour", "timesteps.portion"),
)

# In the two that train a LoRA.
_LORA: tuple[Flag, ...] = (
    Flag("--rank", int, 4, "rank of the LoRA; its alpha is the same", "adapter.rank"),
    Flag("--train_text_encoder", bool, False, "put a LoRA on both text encoders too"),
)

_DEBUG: tuple[Flag, ...] = (
    Flag("--debug_loss", bool, False, "write the loss of each picture under its name", "log.pictures"),
)

_DREAMBOOTH: tuple[Flag, ...] = (
    Flag("--instance_data_dir", str, None, "folder with pictures of the subject"),
    Flag(
        "--instance_prompt",
        str,
        None,
        "caption with the subject's word, such as 'a photo of sks dog'",
        "data.0.caption",
        required=True,
    ),
    Flag("--repeats", int, 1, "how often each picture of the subject is seen per epoch"),
    Flag("--with_prior_preservation", bool, False, "train on pictures of the class too, so that it stays as it is"),
    Flag("--class_data_dir", str, None, "folder with pictures of the class"),
    Flag("--class_prompt", str, None, "caption of the class, such as 'a photo of a dog'"),
    Flag("--prior_loss_weight", float, 1.0, "weight of the class pictures' loss"),
    Flag("--num_class_images", int, 100, "pictures of the class; what is missing is drawn by the base"),
    Flag("--sample_batch_size", int, 4, "class pictures drawn per forward pass"),
    Flag(
        "--prior_generation_precision",
        str,
        None,
        "type in which class pictures are drawn",
        choices=("no", "fp32", "fp16", "bf16"),
    ),
    Flag("--do_edm_style_training", bool, False, "weight the error of the picture by its noise level, as EDM does"),
    Flag("--text_encoder_lr", float, 5e-6, "learning rate of the text encoders' LoRA"),
    Flag("--lr_num_cycles", int, 1, "restarts of cosine_with_restarts", "schedule.cycles"),
    Flag("--lr_power", float, 1.0, "exponent of polynomial", "schedule.power"),
    Flag("--optimizer", str, "AdamW", "AdamW or prodigy"),
    Flag("--prodigy_beta3", float, None, "of prodigy: decay of its estimate; not given: the root of beta2"),
    Flag("--prodigy_decouple", truth, True, "of prodigy: weight decay as in AdamW"),
    Flag("--prodigy_use_bias_correction", truth, True, "of prodigy: Adam's bias correction"),
    Flag("--prodigy_safeguard_warmup", truth, True, "of prodigy: keep warm-up out of the estimate"),
    Flag("--adam_weight_decay_text_encoder", float, 1e-3, "weight decay of the text encoders' LoRA"),
    Flag("--lora_dropout", float, 0.0, "share of the LoRA's inputs set to zero", "adapter.dropout"),
    Flag("--use_dora", bool, False, "DoRA in place of LoRA"),
)


_KOHYA: tuple[Flag, ...] = (
    Flag("--output_kohya_format", bool, False, "write the LoRA for ComfyUI, A1111 and Forge too"),
)

_ADVANCED: tuple[Flag, ...] = (
    Flag("--train_text_encoder_ti", bool, False, "teach both text encoders new words beside the LoRA"),
    Flag("--token_abstraction", str, "TOK", "what prompts and captions call the new words, with commas between"),
    Flag("--num_new_tokens_per_abstraction", int, 2, "embeddings of each new word"),
    Flag("--train_text_encoder_ti_frac", float, 0.5, "share of the run in which the new words learn"),
    Flag("--train_text_encoder_frac", float, 1.0, "share of the run in which the text encoders' LoRA learns"),
    Flag("--clip_skip", int, None, "layers of the text encoders left out before the last but one"),
    Flag("--use_blora", bool, False, "B-LoRA: the two blocks of the UNet that hold content and style"),
    Flag("--lora_unet_blocks", str, None, "blocks of the UNet that learn, such as unet.up_blocks.0.attentions.1"),
    Flag("--cache_latents", bool, False, "nothing: latents are always cached"),
    NOISE_OFFSET,
)


def _table(*groups: tuple[Flag, ...], defaults: Mapping[str, Any]) -> tuple[Flag, ...]:
    """The flags of a script, with the defaults in which it differs."""
    flags = [flag for group in groups for flag in group]
    return tuple(replace(flag, default=defaults.get(flag.name, flag.default)) for flag in flags)


TEXT_TO_IMAGE = _table(_SHARED, _CAPTIONED, _FULL, defaults={})
TEXT_TO_IMAGE_LORA = _table(_SHARED, _CAPTIONED, _LORA, _DEBUG, defaults={"--output_dir": "sd-model-finetuned-lora"})
_OF_SUBJECTS: dict[str, Any] = {
    "--output_dir": "lora-dreambooth-model",
    "--caption_column": None,
    "--validation_epochs": 50,
    "--train_batch_size": 4,
    "--num_train_epochs": 1,
    "--adam_weight_decay": 1e-4,
}
DREAMBOOTH_LORA = _table(_SHARED, _DREAMBOOTH, _KOHYA, _LORA, defaults=_OF_SUBJECTS)
DREAMBOOTH_LORA_ADVANCED = _table(
    _SHARED, _DREAMBOOTH, _LORA, _ADVANCED, defaults=_OF_SUBJECTS | {"--adam_weight_decay_text_encoder": None}
)
