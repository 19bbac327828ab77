"""The model card of a finished run, and its way to the Hugging Face hub."""

import glob
import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_trainer import configfile, hub, lock, sample
from sdxl_trainer.config import Adapter, Config, Data, Hub, Model
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.formats import WORD_FILES
from sdxl_trainer.private import is_hub_id, last_name

TAGS = ("text-to-image", "diffusers", "diffusers-training", "stable-diffusion-xl", "stable-diffusion-xl-diffusers")
OPENRAIL = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
# Kinds of adapters in words, and those that `load_lora_weights` reads.
KINDS = {
    "lora": "A LoRA",
    "dora": "A DoRA",
    "loha": "A LoHa adapter",
    "lokr": "A LoKr adapter",
    "oft": "An OFT adapter",
    "boft": "A BOFT adapter",
}
STOCK = ("lora", "dora")
COLUMNS = 4  # pictures side by side
# Options that say how a model was made, in the words of the config file.
SETTINGS = (
    "train.steps",
    "train.epochs",
    "train.batch_size",
    "train.learning_rate",
    "schedule.name",
    "schedule.warmup_steps",
    "optimizer.name",
    "optimizer.weight_decay",
    "train.max_grad_norm",
    "train.precision",
    "ema.enabled",
    "adapter.kind",
    "adapter.targets",
    "adapter.rank",
    "adapter.alpha",
    "adapter.factor",
    "adapter.dropout",
    "objective.prediction",
    "objective.weighting",
    "objective.snr_gamma",
    "objective.loss",
    "objective.zero_terminal_snr",
    "objective.noise_offset",
    "timesteps.density",
    "timesteps.bias",
    "seed",
)


def card(run_dir: Path, config: Config, repo_id: str | None = None) -> str:
    """The README.md of a run: what was trained on what, with which settings, what it draws, how to load it."""
    name = repo_id or config.hub.id or run_dir.resolve().name
    manifest, samples = _manifest(run_dir), last_samples(run_dir)
    licence = licence_of(config.model)
    sections = [
        f"# {_escaped(name.rpartition('/')[2])}",
        _introduction(config, manifest),
        _gallery(samples),
        _usage(name, config, samples),
        _training(config, manifest),
        _rights(config.model, licence),
    ]
    return _front_matter(config, licence, samples) + "\n" + "\n\n".join(part for part in sections if part) + "\n"


def planned(run_dir: Path, repo_id: str | None = None, private: bool | None = None) -> hub.Plan:
    """What an upload of a finished run would do; what is not given is as its config says. UserError if it has left no
    result."""
    config, target = _target(run_dir, repo_id, private)
    return hub.planned(run_dir, target, _left_out(run_dir, config))


def push(run_dir: Path, repo_id: str | None = None, private: bool | None = None) -> str:
    """Upload the result of a finished run; the address of its page."""
    return upload(run_dir, *_target(run_dir, repo_id, private))


def upload(run_dir: Path, config: Config, target: Hub) -> str:
    """Upload a run's result; the address of its page. A card that nobody changed names the repository there in full,
    as those who find it have to."""
    own = (run_dir / "README.md").read_text(encoding="utf-8") == card(run_dir, config)
    named = partial(card, run_dir, config) if own else lambda repo_id: None
    return hub.push(run_dir, target, _left_out(run_dir, config), named)


def _left_out(run_dir: Path, config: Config) -> list[str]:
    """What serves only to continue the run, and pictures that another run drew in this folder before."""
    folder, own = run_dir / "samples", {row["file"] for row in sample.recorded(run_dir / "samples")}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    return hub.left_out(config, run_dir) + [f"samples/{glob.escape(name)}" for name in found if name not in own]


def _target(run_dir: Path, repo_id: str | None, private: bool | None) -> tuple[Config, Hub]:
    path = run_dir / "config.toml"
    if not path.is_file():
        raise UserError("there is no run in this folder", str(run_dir), "give the output folder of a run")
    if lock.is_held(run_dir):
        raise UserError("a run is at work in this folder", str(run_dir), "let it end first")
    if not (run_dir / "README.md").is_file():
        raise UserError("this run has left no result yet", str(run_dir), "let it end first; the same command continues")
    config = configfile.load(path)
    private = config.hub.private if private is None else private
    return config, Hub(push=True, id=repo_id or config.hub.id, private=private)


def _front_matter(config: Config, licence: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    from huggingface_hub import ModelCardData

    base = config.model.path if is_hub_id(config.model.path) else None
    datasets = [data.path for data in config.data if is_hub_id(data.path)]
    adapter = config.adapter
    more: dict[str, Any] = {"base_model_relation": "adapter" if adapter or config.token else "finetune"} if base else {}
    if samples:
        more["widget"] = [_widget(row) for row in samples]
    data = ModelCardData(
        **licence,
        instance_prompt=trigger(config),
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[
            *TAGS,
            *((adapter.kind, "template:sd-lora") if adapter else ()),
            *(("textual_inversion",) if config.token else ()),
        ],
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _widget(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"text": row["prompt"], "output": {"url": f"samples/{row['file']}"}}
    negative = row.get("negative")
    return {**shown, "parameters": {"negative_prompt": negative}} if negative else shown


def _introduction(config: Config, manifest: dict[str, Any]) -> str:
    data = manifest.get("data")
    pictures = data.get("pictures") if isinstance(data, dict) else None
    counted = f"{plural(pictures, 'picture')} of " if isinstance(pictures, int) else ""
    sets = " and ".join(_linked(item.path, "datasets/") for item in config.data)
    random = config.model.init == "random"
    trained = "trained from random weights of the UNet and the other parts of" if random else "fine-tuned from"
    vae = f" Its VAE is {_linked(config.model.vae)}." if config.model.vae else ""
    objective = config.objective.prediction
    predicts = (
        f" It predicts `{objective}`, as its scheduler's config says." if objective not in (None, "epsilon") else ""
    )
    if config.adapter or config.token:
        parts = " and ".join(f"`{part}`" for part in config.adapter.parts) if config.adapter else ""
        words = ", ".join(_code(word.name) for word in config.token)
        what = [f"{KINDS[config.adapter.kind]} on {parts}"] if config.adapter else []
        what += [f"the new words {words}"] if words else []
        text = " and ".join(what)
        base = _linked(config.model.path)
        return f"{text[0].upper()}{text[1:]} for {base}, trained on {counted}{sets}. It needs that base to draw."
    return f"A Stable Diffusion XL pipeline, {trained} {_linked(config.model.path)} on {counted}{sets}.{vae}{predicts}"


def _gallery(samples: list[dict[str, Any]]) -> str:
    """The pictures of the last step, in rows; relative paths, so that it shows here and on the hub."""
    if not samples:
        return ""
    lines = ["## Samples", "", f"Drawn after {plural(samples[0]['step'], 'step')}."]
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        rows = [row for row in samples if row["prompt"] == prompt]
        width = min(COLUMNS, len(rows))
        cells = [f"![seed {row['seed']}](samples/{row['file']})" for row in rows]
        cells += [""] * (-len(cells) % width)
        table = [f"| {' | '.join(cells[i : i + width])} |" for i in range(0, len(cells), width)]
        lines += ["", f"*{_escaped(prompt)}*", "", table[0], "|" + "---|" * width, *table[1:]]
    return "\n".join(lines)


def _usage(name: str, config: Config, samples: list[dict[str, Any]]) -> str:
    prompt = samples[0]["prompt"] if samples else "a photograph of a lighthouse at dusk"
    model = last_name(config.model.path) if config.adapter or config.token else name
    then = (_loading(name, config.adapter) if config.adapter else "") + (_words(name, config) if config.token else "")
    settings = f"num_inference_steps={config.validation.steps}, guidance_scale={config.validation.guidance}"
    averaged = (
        "\n\n`unet/` holds the averaged weights, `unet_raw/` those of the last step." if config.ema.enabled else ""
    )
    if config.adapter and config.ema.enabled:
        averaged = "\n\nThe weights are averaged; files with `_raw` in their names hold those of the last step."
    return f"""## Use

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({json.dumps(model)}, torch_dtype=torch.float16).to("cuda"){then}
image = pipeline({json.dumps(prompt, ensure_ascii=False)}, {settings}).images[0]
image.save("picture.png")
```{_called(config)}{averaged}"""


def _called(config: Config) -> str:
    words = trigger(config)
    return f"\n\n{_code(words)} in a prompt calls up what was learned." if words else ""


def trigger(config: Config) -> str | None:
    """The words that call up what was learned: those given, or the first that the captions were given, or the one
    caption of all pictures. Not with new words in them, which each program calls in its own way."""
    sets = [data for data in config.data if not data.regularisation]
    given = [config.export.trigger, *(data.trigger for data in sets)]
    given += [data.caption for data in sets if data.caption_only and not _holds_new_word(config, data.caption)]
    return next((words for words in given if words), None)


def _holds_new_word(config: Config, text: str | None) -> bool:
    return any(word.name in (text or "") for word in config.token)


def _loading(name: str, adapter: Adapter) -> str:
    """The line of Python that loads an adapter."""
    if adapter.kind in STOCK:
        return f"\npipeline.load_lora_weights({json.dumps(name)})"
    lines = ["\nfrom huggingface_hub import snapshot_download", "from peft import PeftModel", ""]
    lines += [f"files = snapshot_download({json.dumps(name)})"]
    load = 'pipeline.{0} = PeftModel.from_pretrained(pipeline.{0}, files, subfolder="{0}_adapter")'
    return "\n".join([*lines, *(load.format(part) for part in adapter.parts)])


def _words(name: str, config: Config) -> str:
    """The lines of Python that load new words."""
    words = [[word.name, word.vectors] for word in config.token]
    return f"""
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

rows, first = load_file(hf_hub_download({json.dumps(name)}, "{WORD_FILES[0]}")), 0
for word, count in {json.dumps(words)}:
    for key, i in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(pipeline, "text_encoder" + i), getattr(pipeline, "tokenizer" + i)
        own = rows[key][first : first + count]
        pipeline.load_textual_inversion(own, word, text_encoder=encoder, tokenizer=tokenizer)
    first += count
# The end of a prompt is found by its id: the config's old value means the largest one, which a new word has.
pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id"""


def _training(config: Config, manifest: dict[str, Any]) -> str:
    rows = [(path, _option(config, path)) for path in SETTINGS]
    rows += [(f"data: {last_name(data.path)}", _data_settings(data)) for data in config.data]
    told = [(key, value) for key, value in rows if value not in (None, False, "none")]
    shown = [f"| {_code(key)} | {_escaped(str(value))} |" for key, value in told]
    text = _command(manifest.get("command"))
    ran = f"\n\n```bash\n{text}\n```" if text and "```" not in text else ""
    lines = ["## Training", "", "| setting | value |", "|---|---|", *shown]
    return "\n".join(lines) + f"\n\n`config.toml` has every setting and repeats the run with sdxl-trainer.{ran}"


def _data_settings(data: Data) -> str:
    words = [
        plural(len(data.bucket_sizes), "size") if data.buckets == "sizes" else f"{data.resolution} px",
        f"{data.crop} crop",
    ]
    words += ["aspect-ratio buckets"] if data.buckets != "none" else []
    words += ["mirrored half of the time"] if data.flip else []
    words += [f"{data.caption_dropout:g} of the captions left out"] if data.caption_dropout else []
    return ", ".join(words)


def _rights(model: Model, licence: dict[str, Any]) -> str:
    if not licence:
        return f"## Licence\n\nThe licence of the base model, {_linked(model.path)}, holds for this model too."
    name = licence.get("license_name") or licence["license"]
    link = licence.get("license_link") or (OPENRAIL if licence["license"] == "openrail++" else None)
    shown = f"[{_escaped(str(name))}]({link})" if isinstance(link, str) and "://" in link else f"{_escaped(str(name))}"
    return f"## Licence\n\n{shown}, as the base model."


def licence_of(model: Model) -> dict[str, Any]:
    """The base's own licence: from its card, else that of SDXL where it is known to be SDXL; else nothing is said."""
    found = _card_data(model)
    if found.get("license"):
        return {key: found[key] for key in LICENCE_KEYS if found.get(key)}
    known = re.search(
        r"(stabilityai/)?(stable-diffusion-xl-(base|refiner)|sd_xl_(base|refiner)|sdxl-turbo)", model.path
    )
    return {"license": "openrail++"} if known and "turbo" not in model.path else {}


def _card_data(model: Model) -> dict[str, Any]:
    """The front matter of the base's README.md on this disk; empty where there is none."""
    import yaml
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.repocard import metadata_load

    path = Path(model.path).expanduser()
    readme: Any = (path if path.is_dir() else path.parent) / "README.md"
    if is_hub_id(model.path):
        readme = try_to_load_from_cache(model.path, "README.md", revision=model.revision)
    try:
        found = metadata_load(readme) if isinstance(readme, str | Path) else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _manifest(run_dir: Path) -> dict[str, Any]:
    try:
        tree = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def last_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The pictures of the last step for which there are any; of the averaged weights, if it has those."""
    rows = sample.recorded(run_dir / "samples")
    last = [row for row in rows if row["step"] == max(other["step"] for other in rows)]
    return [row for row in last if row["weights"] == "ema"] or last


def _linked(path: str | None, kind: str = "") -> str:
    """A hub id as a link to its page; of a local path only the name, which is all that others can use."""
    if path and is_hub_id(path):
        return f"[{path}](https://huggingface.co/{kind}{path})"
    return _code(last_name(path or ""))


def _option(config: Config, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part, None)
    return node


def _command(words: Any) -> str:
    """The recorded command without where things lie on this machine, as far as that is easily told."""
    if not isinstance(words, list) or not words:
        return ""
    text = shlex.join([Path(str(words[0])).name, *(str(word) for word in words[1:])])
    return text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text


def _code(text: str) -> str:
    """One line of Markdown code, also in a table."""
    return "`" + " ".join(text.replace("`", "'").split()).replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """One line of Markdown that shows these characters, also in a table."""
    return re.sub(r"([\\|*_\[\]<>`])", r"\\\1", " ".join(text.split()))
