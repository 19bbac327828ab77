"""The run as a value: every option, typed, with its default. TOML in, TOML out; unknown keys are refused.

Options are grouped as the sections of the file. A field's `description` is what `docs/config.md` and editors show.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sdxl_trainer.errors import closest

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Text = str | None


def _possible(path: str) -> str:
    """Refuse what cannot be a path; the messages continue "it should be"."""
    if not path:
        raise ValueError("a path; it is empty")
    if "\0" in path:
        raise ValueError("a path; it holds a zero byte")
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"a path; there is no home folder '{Path(path).parts[0]}'") from None
    return path


PathText = Annotated[str, AfterValidator(_possible)]
# Sides of pictures: latents have an eighth of them.
Side = Annotated[int, Field(ge=8, multiple_of=8)]


def option(default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, description=description, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    path: PathText = Field(description="hub id, diffusers folder, or one .safetensors file")
    revision: Text = option(None, "branch, tag or commit of the hub repository")
    variant: Text = option(None, "file variant such as fp16")
    vae: PathText | None = option(None, "another VAE: hub id or folder, for example madebyollin/sdxl-vae-fp16-fix")
    vae_revision: Text = option(None, "branch, tag or commit of the VAE's repository")
    configs: PathText | None = option(
        None, "diffusers folder with the configs of a single file that is not full-size SDXL"
    )
    init: Literal["pretrained", "random"] = option("pretrained", "random: keep the sizes, forget the UNet's weights")
    attention: Literal["sdpa", "xformers", "npu"] = option("sdpa", "attention kernel; sdpa is the fastest or equal")


class Data(Section):
    path: PathText = Field(description="folder of pictures, hub dataset, local dataset folder, or address of shards")
    name: Text = option(None, "configuration of a hub dataset")
    folder: Text = option(None, "sub-folder of a hub dataset (its data_dir)")
    split: str = option("train", "split of a dataset")
    image_column: str = option("image", "column holding the picture")
    caption_column: str = option("text", "column holding a caption or a list of captions")
    caption: Text = option(None, "one caption for all pictures that have none")
    max_samples: Positive | None = option(None, "use only this many pictures, drawn with the run's seed")
    resolution: Side = option(1024, "side of the square crop in pixels; with buckets the root of the area")
    more_resolutions: tuple[Side, ...] = option((), "every picture is trained at each of these too")
    buckets: Literal["none", "area", "sdxl", "sizes"] = option(
        "none", "shapes of the crops: squares, all shapes of one area, the SDXL paper's list, or bucket_sizes"
    )
    bucket_step: Side = option(64, "sides of area buckets are multiples of this")
    bucket_min: Side | None = option(None, "shortest side of area buckets; default: a quarter of the resolution")
    bucket_max: Side | None = option(None, "longest side of area buckets; default: twice the resolution")
    bucket_sizes: tuple[tuple[Side, Side], ...] = option((), "[width, height] of each bucket, for buckets = 'sizes'")
    no_upscale: bool = option(False, "no picture is enlarged: small ones get a bucket of their own size")
    interpolation: Literal["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"] = option(
        "lanczos", "resampling filter"
    )
    crop: Literal["center", "random"] = option("center", "where the crop is taken")
    crops_per_image: Positive | None = option(None, "random crops kept in the cache per picture; default 4")
    flip: bool = option(False, "mirror half of the time")
    focus: Literal["none", "column", "mask"] = option(
        "none", "a point that crops keep: the one named in focus_column, or the centre of the mask"
    )
    focus_column: str = option("focus", "column of the point: x and y as shares of the picture, from the top left")
    mask: Literal["none", "file", "alpha", "column"] = option(
        "none", "what of a picture is trained: white in a file beside it or named in mask_column, or what is opaque"
    )
    mask_suffix: str = option("-masklabel", "the mask of a.jpg is a-masklabel.png", min_length=1)
    mask_column: str = option("mask", "column holding or naming the mask")
    mask_normalised: bool = option(True, "divide by the mask's mean: small masks weigh as much as large ones")
    unmasked_weight: Fraction = option(0.0, "weight of what the mask leaves out")
    max_upscale: float = option(8.0, "pictures that would be enlarged by more are refused", gt=0)
    caption_dropout: Fraction = option(0.0, "how often the caption is left out; drawn anew every time")
    caption_column_2: Text = option(None, "column with captions for the second text encoder; default: the same ones")
    caption_per_line: bool = option(False, "each line of a caption file is a caption of its own")
    caption_weights: tuple[Annotated[float, Field(ge=0)], ...] = option(
        (), "how often the first, second, ... of a picture's captions is drawn; default: all equally"
    )
    caption_prefix: str = option("", "text before each caption")
    caption_suffix: str = option("", "text after each caption")
    trigger: Text = option(None, "word put in the place of [trigger], or first where a caption does not hold it")
    tag_separator: str = option(",", "what separates the tags of a caption", min_length=1)
    shuffle_tags: bool = option(False, "tags in an order that is drawn")
    tag_dropout: Fraction = option(0.0, "how often each tag is left out")
    keep_tags: int = option(0, "first tags that are neither shuffled nor left out", ge=0)
    keep_separator: Text = option(
        None, "mark such as ||| after the tags that are kept, and before those kept at the end"
    )
    wildcards: bool = option(False, "read {a|b|c} as one of these, and __name__ as a line of the file name.txt")
    wildcards_dir: PathText | None = option(None, "folder of the wildcard files")
    caption_variants: Positive | None = option(
        None, "variants made of each caption by shuffling, leaving out and wildcards; default 8"
    )
    emphasis: bool = option(False, "read weights such as (word:1.2) in these captions, as text.emphasis says")
    weight: float = option(1.0, "factor on the loss of these pictures", gt=0)
    repeats: float = option(1.0, "how often each picture is seen per epoch; 0.5: half of them, in turn", gt=0)
    sampling_weight: float | None = option(
        None, "share of the samples relative to other data sets, in place of repeats", gt=0
    )
    regularisation: bool = option(False, "as many samples an epoch as all other data sets together, in turn")
    kohya_folders: bool = option(False, "folders named 10_words: 10 repeats, and words where there is no caption")
    held_out: Fraction = option(0.0, "share of the pictures kept out of training, chosen by their bytes alone")


class TextOptions(Section):
    dropped_caption: Literal["pipeline", "empty", "zeros"] = option(
        "pipeline", "what a dropped caption becomes: the embedding of '', zeros, or what the model's own pipeline uses"
    )
    long_captions: Literal["a1111", "comfyui", "kohya", "cut"] = option(
        "a1111", "captions of more than 75 tokens: chunks cut and joined as that program does, or cut off"
    )
    max_chunks: int = option(3, "chunks of 75 tokens that a caption may have; what is longer is cut off", ge=1, le=12)
    emphasis: Literal["off", "a1111", "a1111_no_norm", "comfyui"] = option(
        "off", "how (word:1.2) is read in validation prompts, and in captions of data sets with emphasis = true"
    )
    clip_skip: int = option(2, "layer of both encoders that is read, counted from the end: 1 is the last", ge=1)
    drop_encoder_1: Fraction = option(0.0, "how often the first text encoder's part of a caption is left out")
    drop_encoder_2: Fraction = option(0.0, "how often the second encoder's part and pooled output are left out")
    cache: bool = option(True, "false: frozen text encoders stay in memory and encode captions in the step")


class Cache(Section):
    path: PathText | None = option(None, "folder of cached latents and embeddings; default: <output_dir>/cache")
    batch_size: Positive = option(4, "pictures per forward pass of the VAE")
    text_batch_size: Positive = option(32, "captions per forward pass of the text encoders")
    vae_precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "type in which the VAE encodes")
    workers: int | None = option(None, "processes that decode pictures; default: one per core, at most 8", ge=0)
    datasets_dir: PathText | None = option(None, "where hub datasets are kept")


class Objective(Section):
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = option(
        None, "what the UNet predicts; default: what the base model predicts"
    )
    snr_gamma: float | None = option(
        None, "gamma of min_snr (Hang et al. 2023; 5.0 is usual) and soft_min_snr; given alone it means min_snr", gt=0
    )
    zero_terminal_snr: bool = option(False, "rescale the schedule to pure noise at its end (Lin et al. 2024)")
    weighting: (
        Literal["prediction", "sample", "epsilon", "v_prediction", "min_snr", "soft_min_snr", "debiased", "p2"] | None
    ) = option(None, "how timesteps are weighted, whatever is predicted; default: as the plain error of the prediction")
    p2_gamma: float = option(1.0, "exponent of p2 (Choi et al. 2022)", gt=0)
    loss: Literal["l2", "huber", "smooth_l1"] = option("l2", "shape of the loss; huber and smooth_l1 forgive outliers")
    delta: float = option(0.1, "error from which on huber and smooth_l1 are no longer squares", gt=0)
    delta_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "how delta changes over the timesteps: not, from 1 to delta, or by the noise from 1 to delta"
    )
    noise_offset: float = option(0.0, "strength of a constant added to the noise of each channel", ge=0)
    noise_offset_random: bool = option(False, "draw the strength anew each time, from 0 to noise_offset")
    noise_offset_adaptive: float = option(
        0.0, "noise_offset grows by this times the size of the channel's mean in the picture", ge=0
    )
    pyramid_levels: int = option(0, "levels of coarser noise that are added (multi-resolution noise); 6 is usual", ge=0)
    pyramid_discount: float = option(0.3, "strength of each level, relative to the one before", gt=0, lt=1)
    input_perturbation: float = option(
        0.0, "noise added to the input and not to the target (Ning et al. 2023); 0.1 is usual", ge=0
    )
    input_perturbation_random: bool = option(False, "draw its strength anew each time, from 0 to input_perturbation")


class Timesteps(Section):
    density: Literal["uniform", "logit_normal", "sigmoid", "beta", "cubic", "cubic_earlier"] = option(
        "uniform", "how often timesteps are drawn; 0 is the clean end"
    )
    location: float = option(0.0, "of logit_normal: mean before the logistic function; above 0 for more noise")
    scale: float = option(1.0, "of logit_normal: standard deviation before the logistic function", gt=0)
    slope: float = option(8.0, "of sigmoid: how steeply it rises; negative: falls")
    midpoint: float = option(0.5, "of sigmoid: share of the schedule at which it is half its largest")
    alpha: float = option(2.0, "of beta: above 1 the clean end is spared", gt=0)
    beta: float = option(2.0, "of beta: above 1 the noisy end is spared", gt=0)
    sampling: Literal["independent", "stratified", "sobol"] = option(
        "independent", "how a step's timesteps are spread: not, one in each of batch_size parts, or a Sobol sequence"
    )
    importance: bool = option(False, "divide the loss by how much more often than evenly its timestep is drawn")
    bias: Literal["none", "earlier", "later", "range"] = option("none", "which timesteps are drawn more often")
    multiplier: float = option(1.0, "how much more often", gt=0)
    portion: float = option(0.25, "share of the timesteps that earlier and later favour", gt=0, le=1)
    begin: int = option(0, "first timestep of range", ge=0)
    end: int = option(1000, "timestep after the last of range", gt=0)


class Adapter(Section):
    kind: Literal["lora", "dora", "loha", "lokr", "oft", "boft"] = option(
        "lora", "what is put beside the frozen layers"
    )
    parts: tuple[Literal["unet", "text_encoder", "text_encoder_2"], ...] = option(
        ("unet",), "models that get adapters", min_length=1
    )
    targets: str = option(
        "attention",
        "layers: attention, linear, all (linear and convolutions), or a regular expression over their names",
    )
    rank: Positive = option(16, "rank of the update (not of oft, boft)")
    alpha: float | None = option(None, "the update is scaled by alpha / rank; default: the rank", gt=0)
    conv_rank: Positive | None = option(None, "rank for convolutions; default: rank")
    conv_alpha: float | None = option(None, "alpha of convolutions; default: the scale of the other layers", gt=0)
    ranks: dict[str, Positive] = option({}, "regular expression over layer names = rank; the first match decides")
    alphas: dict[str, float] = option({}, "regular expression over layer names = alpha; the first match decides")
    dropout: float = option(0.0, "share of the adapter's inputs set to zero (lora, dora)", ge=0, lt=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) (lora, dora; Kalajdzievski 2023)")
    init: Literal["kaiming", "gaussian"] = option("kaiming", "how A begins (lora, dora); B begins at zero")
    block_size: Positive | None = option(None, "width of the rotated blocks (oft: default 32; boft: default 4)")
    start: PathText | None = option(None, "adapter file, or folder of a run, to begin with")


class Token(Section):
    name: str = Field(description="new word, as it stands in the captions: for example <x>", pattern=r"^[^\s.]+$")
    vectors: Positive = option(1, "how many embeddings the word is; each takes a place of the 75 in a prompt")
    init: Text = option(None, "words (or an earlier new word) whose embeddings it begins with; default: random")
    start: PathText | None = option(None, "file of embeddings, or folder of a run, to begin with")


class Learn(Section):
    match: str = Field(description="regular expression over parameter names; the first rule that matches decides")
    learning_rate: float | None = option(None, "base rate of these tensors; default: train.learning_rate", ge=0)
    weight_decay: float | None = option(None, "default: optimizer.weight_decay", ge=0)
    until: float = option(1.0, "share of the run after which these tensors stay as they are", gt=0, le=1)


class Train(Section):
    steps: Positive | None = option(None, "optimizer steps; or give epochs")
    epochs: Positive | None = option(None, "passes over the data; or give steps")
    batch_size: Positive = option(1, "images per optimizer step, over all processes")
    micro_batch: Positive | None = option(None, "images per forward pass; does not change the result")
    learning_rate: float = option(1e-6, "base learning rate", gt=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global norm; 0: never", ge=0)
    precision: Literal["auto", "fp32", "fp16", "bf16"] = option("auto", "compute type; auto: bf16 where it is fast")
    weights: Literal["fp32", "bf16"] = option("fp32", "type in which the learning tensors are kept")
    frozen: Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "nf4"] = option(
        "auto", "type in which the base is kept beside an adapter or new words; auto: the compute type"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    tf32: bool = option(False, "TensorFloat-32 for fp32 matrix products (NVIDIA Ampere and later)")
    checkpoint_every: int = option(500, "steps between checkpoints; 0: none", ge=0)
    checkpoints_limit: Positive | None = option(None, "how many checkpoints to keep; default: all")
    validate_every: Positive | None = option(None, "steps between validation pictures")
    workers: int = option(1, "threads that read cached rows ahead", ge=0, le=16)


# Optimizers by name, with the options that each has beside weight_decay and what these are if not given.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw8bit": _ADAM,
    "paged_adamw8bit": _ADAM,
    "adamw_bf16": _ADAM,
    "adafactor": {},
    "came": {"betas": (0.9, 0.999, 0.9999)},
    "lion": {"betas": (0.9, 0.99)},
    "muon": _ADAM,
    "prodigy": _ADAM,
    "schedulefree": _ADAM,
    "sgd": {},
}


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError(f"module:Class, or one of: {closest(name, OPTIMIZERS)}")
    return name


class Optimizer(Section):
    name: Annotated[str, AfterValidator(_optimizer)] = option(
        "adamw", f"one of {', '.join(OPTIMIZERS)}; or the `module:Class` of any other (see optimizers.md)"
    )
    betas: tuple[Fraction, ...] | None = option(
        None,
        "decay of the moments; default: 0.9, 0.999 (lion: 0.9, 0.99; came: 0.9, 0.999, 0.9999)",
        validate_default=True,
    )
    eps: float | None = option(None, "added to the denominator; default: 1e-8", gt=0, validate_default=True)
    weight_decay: float = option(1e-2, "weight decay, decoupled but for sgd", ge=0)
    arguments: dict[str, bool | int | float | str | list[float]] = option(
        {}, "any further keyword arguments of the optimizer's class, such as d_coef of prodigy"
    )

    @field_validator("betas", "eps")
    @classmethod
    def _filled(cls, value: Any, info: ValidationInfo) -> Any:
        """What is not given is what the named optimizer has."""
        own = OPTIMIZERS.get(info.data.get("name", ""), {})
        return own.get(str(info.field_name)) if value is None else value


class LearningRate(Section):
    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        option("constant", "shape of the learning rate over the run")
    )
    warmup_steps: int = option(0, "optimizer steps of linear warm-up (not used by constant)", ge=0)
    cooldown_steps: int = option(0, "last optimizer steps, of linear descent to 0 (constant_with_warmup)", ge=0)
    cycles: Positive = option(1, "restarts of cosine_with_restarts")
    power: float = option(1.0, "exponent of polynomial", gt=0)


class Ema(Section):
    enabled: bool = option(False, "keep an exponential moving average of the learning tensors")
    decay: float = option(0.9999, "largest decay; the warm-up rule is min(decay, (1 + n) / (10 + n))", ge=0, lt=1)


class Validation(Section):
    prompts: tuple[str, ...] = option((), "prompts of the validation pictures")
    negative: Text = option(None, "negative prompt; default: the pipeline's own unconditional embedding")
    images: Positive = option(4, "pictures per prompt")
    seed: int | None = option(None, "first seed of each prompt's pictures; default: the run's seed")
    steps: Positive = option(25, "denoising steps")
    guidance: float = option(5.0, "classifier-free guidance scale", ge=0)
    height: Side | None = option(None, "default: that of the first data set's squarest pictures")
    width: Side | None = option(None, "default: that of the first data set's squarest pictures")
    every_epochs: Positive | None = option(None, "pictures after epochs 0, n, 2n, ... (counted from 0)")
    at_start: bool = option(False, "pictures of the base, before the first step")
    at_end: bool = option(True, "pictures of the final model")
    loss_every: Positive | None = option(None, "steps between measures of the loss on the held-out pictures")
    loss_timesteps: Positive = option(4, "timesteps at which each held-out picture is measured, evenly spread")


class Log(Section):
    trackers: tuple[str, ...] = option((), "any of tensorboard, wandb, or another tracker of accelerate")
    dir: PathText = option("logs", "folder of the trackers, under output_dir")
    project: str = option("sdxl-trainer", "project name for the trackers")
    every: Positive | None = option(None, "steps between reading losses from the device; default: 1 on CPU, else 10")


class Export(Section):
    formats: tuple[Literal["kohya", "single"], ...] = option(
        (), "more files at the end: kohya (an adapter for ComfyUI, A1111, Forge), single (a whole model in one file)"
    )
    name: Text = option(None, "name of the files, without .safetensors; default: the name of output_dir")
    dtype: Literal["fp32", "fp16", "bf16"] | None = option(None, "type of the numbers in them; default: as trained")
    metadata: Literal["full", "minimal", "none"] = option(
        "full", "what headers say: everything with tags and settings, what readers need, or nothing"
    )
    trigger: Text = option(None, "words that call up what was learned, for UIs to insert; default: the data's trigger")
    author: Text = option(None, "who made it")
    description: Text = option(None, "what it does")
    license: Text = option(None, "licence; default: the base model's, where it is known")


class Hub(Section):
    push: bool = option(False, "upload the result to the Hugging Face hub at the end")
    id: Text = option(None, "repository id; default: the name of output_dir")
    private: bool = option(False, "make a new repository private")


class Config(Section):
    output_dir: PathText = Field(description="where everything of this run is written")
    seed: int = option(0, "seed of every draw", ge=0, lt=1 << 63)
    model: Model
    data: tuple[Data, ...] = Field(min_length=1, description="one or many data sets")
    text: TextOptions = TextOptions()
    cache: Cache = Cache()
    objective: Objective = Objective()
    timesteps: Timesteps = Timesteps()
    adapter: Adapter | None = option(None, "train a small adapter and leave the model as it is")
    token: tuple[Token, ...] = option((), "new words of the text encoders (textual inversion)")
    learn: tuple[Learn, ...] = option((), "what learns, how fast; default: adapter and new words, else the UNet")
    train: Train
    optimizer: Optimizer = Optimizer()
    schedule: LearningRate = LearningRate()
    ema: Ema = Ema()
    validation: Validation = Validation()
    log: Log = Log()
    export: Export = Export()
    hub: Hub = Hub()
