"""The files that a finished run leaves for other programs, and what they say of it: `[export]` in the config."""

import json
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import cast

from sdxl_trainer import files, publish
from sdxl_trainer.config import Config
from sdxl_trainer.convert import adapters, preview, sources
from sdxl_trainer.convert.request import Request
from sdxl_trainer.data.pictures import Picture, Pictures
from sdxl_trainer.formats import WORD_FILES, lora, metadata, single_file
from sdxl_trainer.formats.lora_names import Layout
from sdxl_trainer.run import Job

REPEATS = 1  # kohya counts pictures by repeats; here they are drawn, and every picture is listed once


def write(job: Job) -> list[Path]:
    """Write what `export.formats` asks for, from the result in the output folder; gives the new files."""
    config, written = job.run.config, list[Path]()
    name = config.export.name or job.output.resolve().name
    picture = _last_picture(job.output)
    for kind in dict.fromkeys(config.export.formats):
        path = job.output / f"{name}.safetensors"
        if kind == "embeddings":
            path = job.output / f"{name}_emb.safetensors"
            files.write_bytes(path, (job.output / WORD_FILES[0]).read_bytes())
            written.append(path)
            continue
        told = described(job)
        if picture and told:
            told["modelspec.thumbnail"] = preview.thumbnail(picture)
        dtype = Request(path, path, dtype=config.export.dtype).torch_dtype()
        if kind == "kohya":
            unet = job.base.config("unet")
            layout = Layout(len(unet["block_out_channels"]), unet["layers_per_block"])
            adapter = sources.adapter(sources.identify(job.output), layout)
            told = metadata.with_places({**told, **adapters.shape_entries(adapter)}) if told else {}
            lora.write(adapter, path, "kohya", told, dtype)
            written.append(_user_data(path, config))
        else:
            single_file.pack(job.output, path, told, dtype)
        written.append(path)
        if picture:
            written.append(preview.beside(path, picture))
    return sorted(written)


def described(job: Job) -> dict[str, str]:
    """What is known of a run, in the entries that other programs read; as few as `export.metadata` asks for."""
    config = job.run.config
    export, side = config.export, config.data[0].resolution
    if export.metadata == "none":
        return {}
    licence = publish.licence_of(config.model).get("license")
    told = metadata.modelspec(
        export.name or job.output.resolve().name,
        resolution=(side, side),
        v_prediction=job.scheduler.get("prediction_type") == "v_prediction",
        kind="lora" if config.adapter else "textual-inversion" if config.token else "",
        architecture=metadata.REFINER if job.samples.refines else metadata.ARCHITECTURE,
    )
    told |= {"modelspec.license": licence} if licence else {}
    if config.adapter:
        network = {"dim": config.adapter.rank, "alpha": f"{config.adapter.alpha or config.adapter.rank:g}"}
        told |= {f"ss_network_{name}": str(value) for name, value in network.items()}
    if config.adapter or config.token:
        told |= {"ss_output_name": export.name or job.output.resolve().name} | metadata.SDXL_ADAPTER
    told |= _settings(job) | _data(cast(Pictures, job.samples.pictures), config) | _course(job)
    given = {"author": export.author, "description": export.description, "license": export.license}
    given |= {"trigger_phrase": publish.trigger(config)}
    # What the user wrote to be read stays, however little is said of the rest.
    return metadata.reduced(told, export.metadata) | {f"modelspec.{key}": text for key, text in given.items() if text}


def _settings(job: Job) -> dict[str, str]:
    """Options of the run, by kohya's names for them."""
    config = job.run.config
    text = [rule for rule in config.learn if "text_encoder" in rule.match]
    values = {
        "sd_model_name": Path(config.model.path).name if Path(config.model.path).exists() else config.model.path,
        "learning_rate": config.train.learning_rate,
        "unet_lr": config.train.learning_rate,
        "text_encoder_lr": [rule.learning_rate or config.train.learning_rate for rule in text] or None,
        "optimizer": config.optimizer.name,
        "lr_scheduler": config.schedule.name,
        "lr_warmup_steps": config.schedule.warmup_steps,
        "total_batch_size": config.train.batch_size,
        "max_grad_norm": config.train.max_grad_norm,
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "mixed_precision": job.run.precision,
        "seed": config.seed,
        "min_snr_gamma": config.objective.snr_gamma,
        "noise_offset": config.objective.noise_offset or None,
        "zero_terminal_snr": config.objective.zero_terminal_snr,
        "caption_dropout_rate": max(data.caption_dropout for data in config.data),
        "resolution": f"({config.data[0].resolution}, {config.data[0].resolution})",
    }
    return {f"ss_{name}": str(value) for name, value in values.items()}


def _data(pictures: Pictures, config: Config) -> dict[str, str]:
    """Pictures, tags and sizes, as A1111 shows them."""
    names = [f"{REPEATS}_{_folder(data.path)}" for data in config.data]
    named = [f"{name} {i}" if name in names[:i] else name for i, name in enumerate(names)]
    folders = dict(zip(named, config.data, strict=True))
    own = {name: pictures.of(number) for number, name in enumerate(folders)}
    tags = {name: _tags(pictures[int(number)] for number in found) for name, found in own.items()}
    trigger = publish.trigger(config)
    if not any(tags.values()) and trigger:
        tags = {f"{REPEATS}_trigger": {trigger: len(pictures)}}
    sizes = Counter(pictures.targets[number] for number in pictures.rows["target"].tolist())
    buckets = {
        str(number): {"resolution": [width, height], "count": count}
        for number, ((height, width), count) in enumerate(sorted(sizes.items()))
    }
    folders_told = {name: {"n_repeats": REPEATS, "img_count": len(found)} for name, found in own.items()}
    return {
        "ss_num_train_images": str(len(pictures)),
        "ss_num_reg_images": "0",
        "ss_dataset_dirs": json.dumps(folders_told, ensure_ascii=False),
        "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def _course(job: Job) -> dict[str, str]:
    """When the run began, and how far it went."""
    manifest = json.loads((job.output / "manifest.json").read_text(encoding="utf-8"))
    began = datetime.fromisoformat(manifest["started"])
    return {
        "ss_training_started_at": str(began.timestamp()),
        "ss_steps": str(job.state.step),
        "ss_max_train_steps": str(job.run.steps),
        "ss_num_epochs": str(-(-job.run.steps // job.order.steps_per_epoch)),
    }


def _tags(pictures: Iterable[Picture]) -> dict[str, int]:
    """How often each tag stands in the captions, the most frequent first; a sentence without commas is one tag."""
    captions = [caption for picture in pictures for caption in picture.captions]
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _folder(path: str) -> str:
    return Path(path).name or path


def _user_data(path: Path, config: Config) -> Path:
    """`name.json` beside the adapter: what A1111 shows and inserts with it."""
    place = path.with_suffix(".json")
    data = {
        "description": config.export.description or "",
        "sd version": "SDXL",
        "activation text": publish.trigger(config) or "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "",
    }
    files.write_json(place, data)
    return place


def _last_picture(output: Path) -> Path | None:
    """A picture of the last step for which there are any."""
    rows = publish.last_samples(output)
    places = [output / "samples" / row["file"] for row in rows]
    return next((place for place in places if place.is_file()), None)
