"""What of a config does not go with the kind of the base: SDXL itself, its refiner, or an inpainting model of it."""

from collections.abc import Iterator

from sdxl_trainer.base import Base
from sdxl_trainer.config import Config, Data, Inpainting
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import single_file
from sdxl_trainer.sampling import samplers

Refusal = tuple[bool, str, str, str]


def refuse(config: Config, base: Base) -> None:
    """UserError for the first option that the base cannot obey."""
    if config.validation.prompts:
        samplers.refuse_lacking(base.config("scheduler"))
    for wrong, what, where, fix in _all(config, base):
        if wrong:
            raise UserError(what, where, fix)


def _all(config: Config, base: Base) -> Iterator[Refusal]:
    if base.refines:
        yield from _refiner(config)
    else:
        default = Data.model_fields["aesthetic_score"].default
        scored = [i for i, data in enumerate(config.data) if data.aesthetic_score != default]
        where = f"data.{scored[0] if scored else 0}.aesthetic_score"
        yield bool(scored), f"{where} has no effect: only a refiner is told a score", where, "remove it"
    if base.inpaints:
        yield from _inpainting(config)
    else:
        what = "[inpainting] has no effect: the base is no inpainting model"
        yield (
            config.inpainting != Inpainting(),
            what,
            "inpainting",
            "remove it, or use a base whose UNet has 9 channels",
        )
    drawn, given = bool(config.validation.prompts), config.validation
    what = "validation.mask without a picture"
    yield drawn and given.mask is not None and given.image is None, what, "validation.mask", "give validation.image"
    whole = "single" in config.export.formats and (base.refines or base.inpaints)
    kind = "a refiner" if base.refines else "an inpainting model"
    yield whole, f"export.formats has 'single', which is not written for {kind}", "export.formats", "remove it"
    asked = {"prediction_type": config.objective.prediction} if config.objective.prediction else {}
    unsaid = single_file.untold(base.config("scheduler") | asked) if "single" in config.export.formats else ""
    yield (
        bool(unsaid),
        f"export.formats has 'single', which cannot say that a model {unsaid}",
        "export.formats",
        "remove it",
    )


def _refiner(config: Config) -> Iterator[Refusal]:
    lone = "the refiner has only the second text encoder"
    parts = config.adapter.parts if config.adapter else ()
    yield "text_encoder" in parts, f"adapter.parts has 'text_encoder': {lone}", "adapter.parts", "remove it"
    yield bool(config.token), f"[[token]]: {lone}, and new words are for both", "token", "train words with SDXL base"
    dropped = config.text.drop_encoder_1 > 0
    yield dropped, f"text.drop_encoder_1 has no effect: {lone}", "text.drop_encoder_1", "remove it"
    lacking = bool(config.validation.prompts) and config.validation.image is None
    what = "validation pictures of a refiner, which changes pictures, and there is none to begin with"
    yield lacking, what, "validation.prompts", "give validation.image"
    what = "validation.mask with a refiner, which draws whole pictures"
    yield config.validation.mask is not None, what, "validation.mask", "remove it"


def _inpainting(config: Config) -> Iterator[Refusal]:
    lacking = bool(config.validation.prompts) and None in (config.validation.image, config.validation.mask)
    what = "validation pictures of an inpainting model without a picture and a mask"
    yield lacking, what, "validation.prompts", "give validation.image and validation.mask"
