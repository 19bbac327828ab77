"""What a finished run leaves: the pipeline in the reference's layout, its card and report, and the hub's copy."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sdxl_trainer import checkpoint, export, files, manifest, optim, publish, report, sharding
from sdxl_trainer.base import Base
from sdxl_trainer.model import SDXL
from sdxl_trainer.run import Job
from sdxl_trainer.sampling.checkpoints import model_index

# Of the time of a run, what the pages about it may take while it goes on.
REPORT_SHARE = 0.02
_COPIED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_KINDS = {".json", ".txt", ".model", ".safetensors"}


def conclude(job: Job) -> None:
    """After the last step: pictures, the pipeline, manifest, card, report, and the copy on the hub."""
    config, accelerator = job.run.config, job.run.accelerator
    _choose(job)
    if config.validation.prompts and config.validation.at_end:
        with job.watch.phase("validation pictures"):
            draw_validation(job)
    with job.watch.phase("saving the pipeline"), optim.evaluating(job.run.optimizer.optimizer):
        result = collected(job)
        if accelerator.is_main_process:
            save_result(job, result)
            exported = export.write(job)
    if accelerator.is_main_process:
        manifest.end(job)
        files.write_text(job.output / "README.md", publish.card(job.output, config))
        page = report.write(job.output)
        job.console.say(f"done: the result is in {job.output}, the report in {page}")
        if exported:
            job.console.say(f"for other programs: {', '.join(path.name for path in exported)}")
    accelerator.wait_for_everyone()
    job.trackers.close()
    if accelerator.is_main_process and config.hub.push:
        job.console.say(f"pushed to {publish.upload(job.output, config, config.hub)}")


def write_report(job: Job) -> None:
    """The page about a run that goes on, as long as that takes no more than a small share of the time."""
    if not job.run.accelerator.is_main_process or time.monotonic() < job.watch.report_after:
        return
    began = time.monotonic()
    with job.watch.phase("report"):
        report.write(job.output)
    job.watch.report_after = time.monotonic() + (time.monotonic() - began) * (1 / REPORT_SHARE - 1)


def _choose(job: Job) -> None:
    """With `keep_best` the result is the model as it was when its validation loss was lowest."""
    step = job.state.best
    if job.run.config.validation.keep_best and step not in {None, job.state.step}:
        assert step is not None
        job.run.accelerator.wait_for_everyone()  # the main process has written it by now
        at = checkpoint.verify(checkpoint.Checkpoint(job.output / f"{checkpoint.PREFIX}{step}", step))
        optimizer = job.run.optimizer.optimizer
        if optim.evaluates(optimizer):  # what is used is made of the tensors that train and of the optimizer's state
            checkpoint.load_training_state(at, job.run.sdxl, optimizer, job.run.groups, None)
        else:
            checkpoint.restore(at, job.run.sdxl, job.state.ema)
        job.console.say(f"the result is the model after step {step}, where its validation loss was lowest")


def collected(job: Job) -> dict[str, dict[str, Tensor]]:
    """The tensors of the result, by the name of a part's folder or the suffix of an adapter's file: the averaged
    weights, and with EMA also the last ones, as raw. Where they are sharded all processes take part."""
    sdxl, ema = job.run.sdxl, job.state.ema
    kinds = {"": ema} if ema is None else {"_raw": None, "": ema}
    found = {}
    for suffix, averages in kinds.items():
        if sdxl.added:
            found[suffix] = checkpoint.added(sdxl, averages)
        else:
            parts = sdxl.parts().items()
            found |= {f"{name}{suffix}": checkpoint.weights(name, part, averages) for name, part in parts}
    main = job.run.accelerator.is_main_process
    return {name: sharding.collected(tensors, main) for name, tensors in found.items()}


def save_result(job: Job, result: dict[str, dict[str, Tensor]]) -> None:
    """The pipeline, or the adapter by itself."""
    if not job.run.sdxl.added:
        save_pipeline(job.output, job.base, job.run.sdxl, result, job.scheduler)
        return
    facts = export.described(job)
    for suffix, values in result.items():
        checkpoint.save_added(job.output, job.run.sdxl, values, facts, suffix)


def draw_validation(job: Job) -> None:
    """Validation pictures with the averaged weights where there are some."""
    with evaluating(job):
        job.validator(job.run.sdxl, job.state.step, "ema" if job.state.ema else "raw")


@contextmanager
def evaluating(job: Job) -> Iterator[None]:
    """While it lasts the model has the weights that are to be judged: averaged ones where there are some."""
    averages, optimizer = job.state.ema, job.run.optimizer.optimizer
    sdxl = job.run.sdxl
    sharding.reshard(sdxl)
    with averages.swapped_in() if averages else optim.evaluating(optimizer):
        yield
        sharding.reshard(sdxl)


def save_pipeline(
    output: Path, base: Base, sdxl: SDXL, result: dict[str, dict[str, Tensor]], scheduler: dict[str, Any]
) -> None:
    """The pipeline at the folder's root. With EMA `unet/` holds the averaged weights and `unet_raw/` the last ones.
    Parts that were not in training are copied from the base.

    `model_index.json` comes last: while it is missing, the folder is not yet a pipeline.
    """
    for name in _untrained(base, sdxl):
        files.write_atomically(output / name, partial(_copy_part, base.part(name), variant=base.variant))
    for own, tensors in result.items():
        name = own.removesuffix("_raw")
        config = checkpoint.config_text(name, sdxl.parts()[name])
        files.write_atomically(output / own, partial(checkpoint.save_part, name=name, config=config, tensors=tensors))
    (output / "scheduler").mkdir(exist_ok=True)
    files.write_json(output / "scheduler" / "scheduler_config.json", scheduler)
    files.write_json(output / "model_index.json", model_index(base, scheduler))


def copied(base: Base, sdxl: SDXL) -> list[Path]:
    """The files of the base that the pipeline's other parts are."""
    return [path for name in _untrained(base, sdxl) for path in _chosen(base.part(name), base.variant)]


def _untrained(base: Base, sdxl: SDXL) -> set[str]:
    return (set(_COPIED) & set(base.parts)) - sdxl.parts().keys()


def _chosen(source: Path, variant: str | None) -> list[Path]:
    """A part's files; of the weights only those of the variant."""
    chosen = [p for p in source.iterdir() if p.is_file() and p.suffix in _KINDS and _variant(p.name) is None]
    weights = [p for p in source.iterdir() if p.suffix == ".safetensors" and variant and _variant(p.name) == variant]
    if weights:
        chosen = [p for p in chosen if p.suffix != ".safetensors" and ".safetensors.index" not in p.name]
        chosen += [p for p in source.iterdir() if p.is_file() and _variant(p.name) == variant and p.suffix in _KINDS]
    return chosen


def _copy_part(source: Path, folder: Path, *, variant: str | None) -> None:
    """Copy a part's files, under their plain names."""
    folder.mkdir()
    for path in _chosen(source, variant):
        name = path.name.replace(f".{variant}", "") if variant and _variant(path.name) == variant else path.name
        if name.endswith(".safetensors.index.json") and variant:
            text = path.read_text(encoding="utf-8").replace(f".{variant}-", "-").replace(f".{variant}.", ".")
            (folder / name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, folder / name)


def _variant(name: str) -> str | None:
    """fp16 of model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json."""
    found = re.fullmatch(r"[\w]+\.(\w+?)(-\d+-of-\d+)?\.safetensors", name)
    found = found or re.fullmatch(r"[\w]+\.safetensors\.index\.(\w+)\.json", name)
    return found.group(1) if found else None
