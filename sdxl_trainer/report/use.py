"""How to use what a run made, as text to copy: in diffusers, on the command line, in ComfyUI and A1111."""

import json
import shlex
from pathlib import Path
from typing import Any

from sdxl_trainer.formats import ADAPTER_FILE, WORD_FILES
from sdxl_trainer.report.records import Run
from sdxl_trainer.report.words import number, part, safe, table

LONGEST_BLOCK = 100_000  # characters of a block such as the config
# How to call each pipeline of diffusers: what goes before the options, and lines to have it ready.
_CALLS = {
    "StableDiffusionXLImg2ImgPipeline": ("image=start, ", ['start = load_image("picture.png")']),
    "StableDiffusionXLInpaintPipeline": (
        "image=start, mask_image=mask, ",
        ['start, mask = load_image("picture.png"), load_image("mask.png")'],
    ),
}


def section_body(run: Run, again: str) -> str:
    """Text to copy; `again` is the command that continues a run which is not complete."""
    path = str(part(run.config, "output_dir") or run.folder)
    lead = ""
    if not run.done and again:
        lead = "<p>The run is not complete. The same command continues it from its last checkpoint:</p>"
        lead += block("Command that continues the run", again)
    prompt = next((sample.prompt for sample in run.samples if 0 < len(sample.prompt) <= 300), "a photo")
    shell = f"{_sample(run, path)} --prompt {shlex.quote(prompt)} --out pictures"
    when = "In" if run.done else "Once it is complete, in"
    return (
        f"{lead}<p>{when} Python, with diffusers:</p>{block('Python code', _python(run, path, prompt))}"
        f"<p>On the command line:</p>{block('Command that draws pictures', shell)}{_elsewhere(run, path)}"
    )


def block(label: str, text: str) -> str:
    """Text with a button that copies it."""
    code = f"<code>{safe(text, LONGEST_BLOCK)}</code>"
    return (
        f'<div class="block"><pre tabindex="0" role="region" aria-label="{label}">{code}</pre>'
        '<button type="button" class="copy scripted">Copy</button></div>'
    )


def _base(run: Run) -> str:
    return str(part(run.config, "model", "path") or part(run.manifest, "base", "path") or "BASE")


def _lora(run: Run) -> bool:
    """Whether an adapter is of the result, also of a run that has not come so far."""
    return (run.folder / ADAPTER_FILE).is_file() or part(run.config, "adapter") is not None


def _words(run: Run) -> bool:
    return (run.folder / WORD_FILES[0]).is_file() or bool(part(run.config, "token"))


def _sample(run: Run, path: str) -> str:
    """The command without its prompt."""
    added = ["--lora"] * _lora(run) + ["--embedding"] * _words(run)
    if added:
        own = " ".join(f"{option} {shlex.quote(path)}" for option in added)
        return f"sdxl sample {shlex.quote(_base(run))} {own}"
    kind = _pipeline(run)
    more = " --image picture.png" if kind in _CALLS else ""
    more += " --mask mask.png" if "Inpaint" in kind else ""
    return f"sdxl sample {shlex.quote(path)}{more}"


def _pipeline(run: Run) -> str:
    """The class of the pipeline that the run left."""
    try:
        told = json.loads((run.folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    name = part(told, "_class_name")
    return name if name in _CALLS else "StableDiffusionXLPipeline"


def _python(run: Run, path: str, prompt: str) -> str:
    validation = table(run.config, "validation")
    given = {"height": "height", "width": "width", "steps": "num_inference_steps", "guidance": "guidance_scale"}
    kind = _pipeline(run)
    before, ready = _CALLS.get(kind, ("", []))
    given = {k: v for k, v in given.items() if not before or k in {"steps", "guidance"}}
    options = "".join(f", {name}={number(validation[k])}" for k, name in given.items() if number(validation.get(k)))
    source = _base(run) if _lora(run) or _words(run) else path
    lines = [
        "import torch",
        f"from diffusers import {kind}",
        *(["from diffusers.utils import load_image"] if before else []),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
        f"pipeline = {kind}.from_pretrained({source!r}, torch_dtype=dtype).to(device)",
        *(_loading(run, path) if _lora(run) else []),
        *(_reading(run, path) if _words(run) else []),
        *ready,
        "generator = torch.Generator().manual_seed(0)",
        f"image = pipeline({prompt!r}, {before}generator=generator{options}).images[0]",
        'image.save("picture.png")',
    ]
    return "\n".join(lines)


def _loading(run: Run, path: str) -> list[str]:
    """What puts the adapter into a pipeline: diffusers reads LoRA and DoRA, peft the other kinds."""
    adapter = table(run.config, "adapter")
    if (run.folder / ADAPTER_FILE).is_file() or adapter.get("kind", "lora") in {"lora", "dora"}:
        return [f"pipeline.load_lora_weights({path!r})"]
    parts = adapter.get("parts") or ["unet"]
    load = "pipeline.{0} = PeftModel.from_pretrained(pipeline.{0}, {1!r}, subfolder='{0}_adapter')"
    return ["from peft import PeftModel", *(load.format(name, path) for name in parts)]


def _reading(run: Run, path: str) -> list[str]:
    """What teaches a pipeline the new words."""
    return [
        "from safetensors.torch import load_file",
        f"rows, first = load_file({f'{path}/{WORD_FILES[0]}'!r}), 0",
        f"for word, count in {_tokens(run)!r}:",
        "    for key, i in (('clip_l', ''), ('clip_g', '_2')):",
        "        encoder, tokenizer = getattr(pipeline, 'text_encoder' + i), getattr(pipeline, 'tokenizer' + i)",
        "        own = rows[key][first : first + count]",
        "        pipeline.load_textual_inversion(own, word, text_encoder=encoder, tokenizer=tokenizer)",
        "    first += count",
        "# the end of a prompt is found by its id, and not as the largest one, which a new word has",
        "pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id",
    ]


def _tokens(run: Run) -> list[tuple[str, int]]:
    """The new words, and how many vectors each has."""
    tokens = [token for token in run.config.get("token") or [] if isinstance(token, dict)]
    return [(str(token.get("name")), int(number(token.get("vectors")) or 1)) for token in tokens]


def _elsewhere(run: Run, path: str) -> str:
    """ComfyUI and A1111: the files they read, where they go, and what to write."""
    parts = [*([_words_elsewhere(run)] if _words(run) else [])]
    if _lora(run) or not parts:
        parts.append(_weights_elsewhere(run, path))
    return "".join(parts)


def _words_elsewhere(run: Run) -> str:
    word = next((name for name, _ in _tokens(run)), "the word")
    text = (
        f"# ComfyUI: the files of embeddings/ into models/embeddings, then embedding:NAME in the prompt\n"
        f"# A1111 and Forge: into embeddings, then NAME in the prompt; here the word is {word}"
    )
    return f"<p>In ComfyUI and A1111:</p>{block('For other programs', text)}"


def _weights_elsewhere(run: Run, path: str) -> str:
    name = Path(path.rstrip("/\\")).name or "model"
    if _lora(run) and table(run.config, "adapter").get("kind") in {"oft", "boft"}:
        return ""  # other programs have no such layout
    if _lora(run):
        target, kind = f"{name}.safetensors", "--to kohya "
        there = (
            "# ComfyUI: into models/loras, node Load LoRA\n# A1111 and Forge: into models/Lora, then in the prompt: "
        )
        there += f"<lora:{name}:1>"
    elif _pipeline(run) == "StableDiffusionXLPipeline":
        target, kind = f"{name}.safetensors", ""
        there = (
            "# ComfyUI: into models/checkpoints, node Load Checkpoint\n# A1111 and Forge: into models/Stable-diffusion"
        )
    else:
        return ""
    exported = run.folder / f"{name}.safetensors"
    made = f"# {exported.name} lies in this folder already" if exported.is_file() else ""
    made = made or f"sdxl convert {shlex.quote(path)} {shlex.quote(target)} {kind}".rstrip()
    return f"<p>In ComfyUI, A1111 and Forge:</p>{block('For other programs', f'{made}{chr(10)}{there}')}"


def command(run: Run) -> str:
    """The recorded command line."""
    words: Any = run.manifest.get("command")
    return shlex.join(str(word) for word in words) if isinstance(words, list) else str(words or "")
