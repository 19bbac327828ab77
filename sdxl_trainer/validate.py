"""Validation pictures from the live modules, shared among the processes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxl_trainer import distributed, sample
from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Config, steps_of
from sdxl_trainer.data import buckets
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.data.prepare import EMPTY, written
from sdxl_trainer.errors import plural
from sdxl_trainer.formats import pretrained
from sdxl_trainer.model import SDXL
from sdxl_trainer.sampling import draw as drawing
from sdxl_trainer.sampling.request import Request
from sdxl_trainer.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator


def _in_fp32(call: Callable[..., Any], device: str, *arguments: Any, **named: Any) -> Any:
    with torch.autocast(device, enabled=False):
        return call(*arguments, **named)


@dataclass(frozen=True)
class Validator:
    """What is needed to draw the validation pictures of a run at any step."""

    config: Config
    accelerator: "Accelerator"
    base: Base
    samples: Samples
    scheduler: dict[str, Any]
    dtype: torch.dtype  # of what the UNet takes
    say: Callable[[str], None]
    trackers: Trackers

    def due(self, step: int, steps: int, steps_per_epoch: int) -> bool:
        """Is it time after `step` steps?"""
        options, every = self.config.validation, steps_of(self.config.train.validate_every, steps_per_epoch)
        if not options.prompts:
            return False
        if step in {0, steps}:
            return options.at_end if step else options.at_start
        if every and step % every == 0:
            return True
        epoch, position = divmod(step, steps_per_epoch)
        return bool(options.every_epochs and position == 0 and (epoch - 1) % options.every_epochs == 0)

    def drawn(self, step: int) -> bool:
        """Are the pictures of this step there? The main process looks."""
        rows = partial(sample.recorded, Path(self.config.output_dir).expanduser() / "samples")
        return distributed.decided(self.accelerator, lambda: any(row["step"] == step for row in rows()))

    def __call__(self, sdxl: SDXL, step: int, weights: str) -> None:
        """Draw all prompts with the model as it is now into samples/step-N/ and hand them to the trackers."""
        options, accelerator = self.config.validation, self.accelerator
        folder = Path(self.config.output_dir).expanduser() / "samples"
        pipeline, training = self._pipeline(sdxl.unet), sdxl.training
        sdxl.eval()
        known: dict[str, str] = {}
        named = list(sample.requests(options.prompts, options.images, self._seed(), **self._settings()))
        for index, counts in distributed.turns(accelerator, len(named)):
            name, request = named[index]
            with torch.no_grad():
                model = drawing.Model(pipeline, self.scheduler, self._conditions(request, sdxl))
            (image,) = drawing.paint(model, [request], autocast=accelerator.autocast())
            if counts:
                sample.save(image, folder / f"step-{step:06}" / name, request, known)
        sdxl.train(training)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            rows = [sample.note(request, f"step-{step:06}/{name}", step, weights) for name, request in named]
            sample.record(folder, rows)
            self._track(folder, rows, step)
            self.say(f"step {step}: {plural(len(rows), 'validation picture')} in {folder / f'step-{step:06}'}")

    def _pipeline(self, unet: Any) -> Any:
        from diffusers import AutoencoderKL

        # The VAE decodes in fp32: the original one overflows in fp16.
        vae = pretrained.load(
            AutoencoderKL, self.base.vae, weights_file(self.base, "vae"), torch_dtype=torch.float32
        ).to(self.accelerator.device)
        vae.encode = partial(_in_fp32, vae.encode, self.accelerator.device.type)
        return drawing.live_pipeline(unet, vae, self.scheduler, refines=self.base.refines)

    def _seed(self) -> int:
        seed = self.config.validation.seed
        return self.config.seed if seed is None else seed

    def _settings(self) -> dict[str, Any]:
        options, data = self.config.validation, self.config.data[0]
        height, width = buckets.nearest((1, 1), buckets.sizes(data, data.resolution))
        return {
            "negative": options.negative,
            "steps": options.steps,
            "guidance": options.guidance,
            **self._sides(height, width),
            "image": options.image,
            "mask": options.mask,
            "strength": options.strength,
            **sample.read_as(self.config.text),
            **self._result(),
        }

    def _sides(self, height: int, width: int) -> dict[str, int]:
        """Those asked for, else those of the picture to begin with, else the data's."""
        options = self.config.validation
        if options.image:
            height, width = drawing.size(options.image)
        return {"height": options.height or height, "width": options.width or width}

    def _result(self) -> dict[str, Any]:
        """What the pictures will have been drawn with when the run is done, for those who want more of them."""
        output = str(Path(self.config.output_dir).expanduser())
        if not (self.config.adapter or self.config.token):
            return {"model": output}
        added = {"loras": (output,)} if self.config.adapter else {}
        return {"model": self.config.model.path, **added, **({"embeddings": (output,)} if self.config.token else {})}

    def _conditions(self, request: Request, sdxl: SDXL) -> dict[str, Tensor]:
        reading = self.config.text
        negative = EMPTY if not request.negative else written(reading, request.negative)
        zeros = request.negative is None and self.base.zeros_for_empty()
        both = self._embed(written(reading, request.prompt), sdxl), self._embed(negative, sdxl)
        conditions = drawing.conditions(*both, zeros=zeros)
        return {name: tensor.to(self.dtype) for name, tensor in conditions.items()}

    def _embed(self, prompt: Prompt, sdxl: SDXL) -> drawing.Embedded:
        """Embeddings and pooled output: cached, or by the text encoders as they are now."""
        words = self.samples.words
        text: dict[str, Any] = {n: t.to(self.accelerator.device) for n, t in words.together([prompt]).items()}
        if "tokens" in text:
            with self.accelerator.autocast():
                embeds, pooled = sdxl.embed(**text)
            return embeds[0], pooled[0]
        return text["prompt_embeds"][0], text["pooled"][0]

    def _track(self, folder: Path, rows: list[dict[str, Any]], step: int) -> None:
        """Hand the pictures to the trackers, under their prompts."""
        for prompt in dict.fromkeys(row["prompt"] for row in rows):
            own = [folder / row["file"] for row in rows if row["prompt"] == prompt]
            self.trackers.pictures(prompt, own, step)
