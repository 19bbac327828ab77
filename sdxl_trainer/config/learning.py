"""What learns: adapters, new words, rules over parameter names."""

from typing import Literal

from pydantic import Field

from sdxl_trainer.config.section import PathText, Positive, Section, Text, option


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
    factor: Positive | None = option(
        None, "side of the first of the two factors (lokr); default: near the square root of the layer's"
    )
    block_size: Positive | None = option(None, "width of the rotated blocks (oft: default 32; boft: default 4)")
    start: PathText | None = option(None, "adapter file, or folder of a run, to begin with")


class Token(Section):
    name: str = Field(
        description="new word, as it stands in the captions, in any case: for example <x>", pattern=r"^[^\s.]+$"
    )
    placeholder: Text = option(None, "what captions and prompts say in its place, such as TOK; default: its name")
    vectors: Positive = option(1, "how many embeddings the word is; each takes a place of the 75 in a prompt")
    init: Text = option(None, "words (or an earlier new word) whose embeddings it begins with; default: random")
    start: PathText | None = option(None, "file of embeddings, or folder of a run, to begin with")


class Learn(Section):
    match: str = Field(description="regular expression over parameter names; the first rule that matches decides")
    learning_rate: float | None = option(None, "base rate of these tensors; default: train.learning_rate", ge=0)
    weight_decay: float | None = option(None, "default: optimizer.weight_decay", ge=0)
    until: float = option(1.0, "share of the run after which these tensors stay as they are", gt=0, le=1)
