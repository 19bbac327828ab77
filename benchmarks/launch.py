"""Run a training script as it is and note from outside what it does. Started by `peers.py`:

    python benchmarks/launch.py EVENTS.jsonl SCRIPT [arguments ...]

Each event is a line {"event", "at" (seconds since 1970), ...}: `step` after each optimizer step, `end` with the peak of
resident memory. MODE in the environment adds to that: `stages` tells how long each thing takes that the reference does
until all is encoded, `record` keeps what the first steps train on, `pipeline` puts a trivial module for the UNet.
"""

import json
import os
import runpy
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

RECORDED_STEPS = 20


def main() -> None:
    events, script, *arguments = sys.argv[1:]
    stream = Path(events).open("a", encoding="utf-8", buffering=1)

    def note(event: str, **facts: Any) -> None:
        stream.write(json.dumps({"event": event, "at": time.time(), **facts}) + "\n")

    mode = os.environ.get("MODE", "")
    if os.environ.get("OURS"):
        import sdxl_trainer  # noqa: F401 - it decides how threads wait, before PyTorch is loaded, as our script does
    declare_torchvision()
    watch_steps(note)
    if mode == "stages":
        watch_reference(note)
    if mode == "record":
        record(Path(events).with_suffix(".pt"))
    if mode == "pipeline":
        replace_unet()
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    status: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    sys.path.append(str(Path(__file__).parent))
    import common  # not before: it would decide how the reference's threads wait

    note("end", peak_bytes=common.status_bytes("VmHWM"), status=status or 0)
    sys.exit(status)


def declare_torchvision() -> None:
    """Name the operators that torchvision's Python part mentions, where its compiled part is of another build."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", "qnms(Tensor a) -> Tensor"):
        library.define(name)
    globals()["_kept"] = library  # as long as it lives, so do its operators


def watch_steps(note: Any) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: note("step"))


def watch_reference(note: Any) -> None:
    """`stage` for each call of what the reference does until everything is encoded: read the data set, load tokenizers,
    text encoders and VAE, hash what its cache depends on, and encode, in `Dataset.map`. All is imported before."""
    import datasets
    from datasets.fingerprint import Hasher
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    assert CLIPTokenizer  # AutoTokenizer would import it while it is timed
    within: list[str] = []  # of a call within a call the outer one counts

    def timed(plain: Any) -> Any:
        @wraps(plain)
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.time()
            within.append(plain.__name__)
            try:
                return plain(*arguments, **options)
            finally:
                within.pop()
                if not within:
                    note("stage", name=plain.__name__, seconds=time.time() - began)

        return call

    datasets.load_dataset, datasets.Dataset.map = timed(datasets.load_dataset), timed(datasets.Dataset.map)
    Hasher.hash = staticmethod(timed(Hasher.hash))
    for kind in (AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, AutoencoderKL):
        kind.from_pretrained = staticmethod(timed(kind.from_pretrained))


def record(path: Path) -> None:
    """Keep what each of the first steps gives the noise scheduler and the UNet, its loss, and the first weights."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel

    steps: list[dict[str, Any]] = []
    noise, forward, backward = DDPMScheduler.add_noise, UNet2DConditionModel.forward, Accelerator.backward

    def add_noise(self: Any, latents: Any, drawn: Any, timesteps: Any) -> Any:
        steps.append({"latents": latents.clone(), "noise": drawn.clone(), "timesteps": timesteps.clone()})
        return noise(self, latents, drawn, timesteps)

    def predict(self: Any, sample: Any, timesteps: Any, states: Any, **options: Any) -> Any:
        steps[-1] |= {"states": states.clone(), **{n: t.clone() for n, t in options["added_cond_kwargs"].items()}}
        return forward(self, sample, timesteps, states, **options)

    def learn(self: Any, loss: Any, **options: Any) -> Any:
        steps[-1]["loss"] = loss.detach().clone()
        if len(steps) == RECORDED_STEPS:
            torch.save(steps, path)
        return backward(self, loss, **options)

    DDPMScheduler.add_noise, UNet2DConditionModel.forward, Accelerator.backward = add_noise, predict, learn


def replace_unet() -> None:
    """A UNet that costs nothing: what is left of a step is the input pipeline."""
    from diffusers import UNet2DConditionModel

    def forward(self: Any, sample: Any, *_: Any, **__: Any) -> Any:
        return (sample * self.conv_out.bias.sum(),)

    UNet2DConditionModel.forward = forward


if __name__ == "__main__":
    main()
