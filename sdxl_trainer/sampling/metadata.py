"""What a picture says of itself: for A1111, for ComfyUI, and for this program, which draws it again from any of them.

`parameters` is A1111's text, `prompt` is ComfyUI's graph of nodes, `sdxl_trainer` the request as JSON.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer import files
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import ADAPTER_FILE
from sdxl_trainer.sampling import samplers
from sdxl_trainer.sampling.request import Request

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

OWN = "sdxl_trainer"
_USER_COMMENT = 0x9286
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<lora:([^:>]+)(?::([-\d.]+))?[^>]*>")
_FEWEST = 3  # pairs that make a line one of settings, as A1111 has it


def info(request: Request, facts: dict[str, str]) -> "PngInfo":
    """Everything that is written into a PNG. `facts`: hashes of files, by path."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    texts = {"parameters": infotext(request, facts), "prompt": json.dumps(graph(request)), OWN: own(request)}
    for key, text in texts.items():
        try:
            text.encode("latin-1")
            chunks.add_text(key, text)
        except UnicodeEncodeError:
            chunks.add_itxt(key, text)
    return chunks


def own(request: Request) -> str:
    return json.dumps(request.told())


def hashes(request: Request, known: dict[str, str]) -> dict[str, str]:
    """SHA-256 of the files that a request names, by the text that names them; folders have none."""
    for text in (request.model, *(lora_file(lora)[0] for lora in request.loras)):
        if text and text not in known:
            path = Path(text).expanduser()
            known[text] = files.sha256(path) if path.is_file() else ""
    return known


def lora_file(text: str) -> tuple[str, float]:
    """FILE or FILE:weight in parts; of a run's folder the file of the adapter in it."""
    name, colon, number = text.rpartition(":")
    path, weight = (name, number) if colon and not Path(text).expanduser().exists() else (text, "1")
    inside = Path(path).expanduser() / ADAPTER_FILE
    return (str(inside) if inside.is_file() else path), float(weight)


def _name(path: str) -> str:
    """What other programs call a file."""
    found = Path(path).name if Path(path).suffix == ".safetensors" else Path(path).resolve().name
    if found == ADAPTER_FILE:
        found = Path(path).resolve().parent.name
    return found.removesuffix(".safetensors")


def infotext(request: Request, facts: dict[str, str]) -> str:
    """The settings as A1111 writes them under a picture."""
    loras = [(_name(path), weight, facts.get(path, "")) for path, weight in map(lora_file, request.loras)]
    plain = request.emphasis == "off"
    prompt = _literal(request.prompt) if plain else request.prompt
    tags = "".join(f" <lora:{name}:{weight:g}>" for name, weight, _ in loras)
    lines = [f"{prompt}{tags}"]
    if request.negative:
        lines.append(f"Negative prompt: {_literal(request.negative) if plain else request.negative}")
    sampler, spacing = samplers.split(request.sampler) if request.sampler else ("Euler", "")
    pairs: dict[str, Any] = {"Steps": request.steps, "Sampler": sampler}
    pairs |= {"Schedule type": spacing} if spacing else {}
    pairs |= {"CFG scale": f"{request.guidance:g}", "Seed": request.seed, "Size": f"{request.width}x{request.height}"}
    pairs |= {"Model hash": facts[request.model][:10]} if facts.get(request.model) else {}
    pairs |= {"Model": _name(request.model)} if request.model else {}
    pairs |= {"Denoising strength": f"{request.how_strong:g}"} if request.image else {}
    pairs |= {"Clip skip": request.clip_skip} if request.clip_skip != 2 else {}
    pairs |= {"CFG Rescale phi": f"{request.rescale:g}"} if request.rescale else {}
    if request.refiner:
        pairs |= {"Refiner": _name(request.refiner)}
        pairs |= {} if request.refine_strength else {"Refiner switch at": f"{request.refined_from:g}"}
    told = ", ".join(f"{name}: {digest[:12]}" for name, _, digest in loras if digest)
    pairs |= {"RNG": "CPU"} | ({"Lora hashes": told} if told else {}) | {"Version": "sdxl-trainer"}
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())])


def _literal(text: str) -> str:
    """Brackets that are only brackets, as A1111 has them written."""
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def graph(request: Request) -> dict[str, Any]:
    """The picture as ComfyUI's graph in API form: id -> class and inputs, [id, output] naming another node's output."""
    nodes: dict[str, Any] = {}

    def node(kind: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return str(len(nodes))

    loader = node("CheckpointLoaderSimple", ckpt_name=f"{_name(request.model) or 'model'}.safetensors")
    model, clip = [loader, 0], [loader, 1]
    for path, weight in map(lora_file, request.loras):
        told = {"lora_name": f"{_name(path)}.safetensors", "strength_model": weight, "strength_clip": weight}
        model = [node("LoraLoader", model=model, clip=clip, **told), 0]
        clip = [model[0], 1]
    if request.clip_skip != 2:
        clip = [node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-request.clip_skip), 0]
    if request.rescale:
        model = [node("RescaleCFG", model=model, multiplier=request.rescale), 0]
    positive = [_encoded(node, request, clip, False), 0]
    negative = [_encoded(node, request, clip, True), 0]
    latent = [_begun(node, request, [loader, 2]), 0]
    sampler, spacing = samplers.split(request.sampler) if request.sampler else ("Euler", "")
    settings: dict[str, Any] = {"seed": request.seed, "steps": request.steps, "cfg": request.guidance}
    settings |= {"sampler_name": samplers.SAMPLERS[sampler].comfy, "scheduler": samplers.SPACINGS[spacing][1]}
    settings["denoise"] = request.how_strong if request.image else 1.0
    told = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    drawn = node("KSampler", **settings, **told)
    node("SaveImage", images=[node("VAEDecode", samples=[drawn, 0], vae=[loader, 2]), 0], filename_prefix="sdxl")
    return nodes


def _encoded(node: Any, request: Request, clip: list[Any], negative: bool) -> str:
    """The node of a prompt; the one with micro-conditioning where more than the defaults is told."""
    text, second = (request.negative or "", request.negative_2) if negative else (request.prompt, request.prompt_2)
    told = [request.negative_original_size, request.negative_crop, request.negative_target_size]
    told = told if negative and any(told) else [request.original_size, request.crop, request.target_size]
    if second is None and not any(told):
        return node("CLIPTextEncode", text=text, clip=clip)
    size = (request.height, request.width)
    original, crop, target = told[0] or size, told[1] or (0, 0), told[2] or size
    sizes = {"width": original[1], "height": original[0], "crop_w": crop[1], "crop_h": crop[0]}
    sizes |= {"target_width": target[1], "target_height": target[0]}
    return node("CLIPTextEncodeSDXL", text_l=text, text_g=text if second is None else second, clip=clip, **sizes)


def _begun(node: Any, request: Request, vae: list[Any]) -> str:
    """The node of the latents to begin with."""
    if not request.image:
        return node("EmptyLatentImage", width=request.width, height=request.height, batch_size=1)
    loaded = node("LoadImage", image=Path(request.image).name)
    latent = node("VAEEncode", pixels=[loaded, 0], vae=vae)
    if request.mask:
        shown = node("LoadImageMask", image=Path(request.mask).name, channel="red")
        latent = node("SetLatentNoiseMask", samples=[latent, 0], mask=[shown, 0])
    return latent


def read(path: Path) -> dict[str, Any]:
    """The settings in a picture, of this program, A1111 or ComfyUI: a prompt, and what else it says."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)} | _exif(image)
    except FileNotFoundError:
        raise UserError(f"there is no file '{path}'", "--like", "give a picture that was drawn") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"this is no picture: {error}", str(path), "give a PNG that was drawn") from None
    for key, reader in ((OWN, _read_own), ("parameters", read_infotext), ("prompt", read_graph)):
        if key in texts:
            found = reader(texts[key], str(path))
            if found:
                return found
    fix = "pictures that were edited or sent by chat programs have lost what they said"
    raise UserError("the picture does not say how it was drawn", str(path), fix)


def _exif(image: Any) -> dict[str, str]:
    """A1111's text in a JPEG or WebP, whose user comment is UTF-16 after a mark of 8 bytes."""
    comment = image.getexif().get_ifd(0x8769).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return {}
    return {"parameters": comment[8:].decode("utf-16-be", errors="replace")}


def _read_own(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f"its entry '{OWN}' is damaged", where, "draw the picture again")
    return found


def read_infotext(text: str, where: str) -> dict[str, Any]:
    """Settings from A1111's text. Adapters are known by name alone: `loras` are those names with their weights."""
    *lines, last = text.strip().split("\n")
    pairs = {key: _unquoted(value) for key, value in _PAIR.findall(last)}
    if len(_PAIR.findall(last)) < _FEWEST:
        lines, pairs = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    loras = tuple(f"{name}.safetensors:{weight or 1}" for name, weight in _LORA.findall(prompt))
    found: dict[str, Any] = {"prompt": _LORA.sub("", prompt).strip(), "emphasis": "a1111"}
    found |= {"negative": negative} if negative else {}
    found |= {"loras": loras} if loras else {}
    names: dict[str, str] = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "CFG Rescale phi": "rescale"}
    found |= {name: pairs[key] for key, name in names.items() if key in pairs}
    width, _, height = pairs.get("Size", "").partition("x")
    found |= {"width": width, "height": height} if width.isdigit() and height.isdigit() else {}
    if "Sampler" in pairs:
        spacing = pairs.get("Schedule type", "")
        found["sampler"] = f"{pairs['Sampler']} {'' if spacing == 'Automatic' else spacing}".strip()
    return found


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value


def read_graph(text: str, where: str) -> dict[str, Any]:
    """Settings from ComfyUI's graph, found from its first sampler backwards."""
    try:
        nodes = json.loads(text)
        sampler = next(n for n in nodes.values() if n["class_type"] in {"KSampler", "KSamplerAdvanced"})
        inputs = sampler["inputs"]
        positive, negative = (_upstream(nodes, inputs[name]) for name in ("positive", "negative"))
    except (ValueError, AttributeError, KeyError, TypeError, StopIteration):
        return {}
    found: dict[str, Any] = {"prompt": str(positive.get("text", positive.get("text_l", ""))), "emphasis": "comfyui"}
    found["long_prompts"] = "comfyui"
    told = str(negative.get("text", negative.get("text_l", "")))
    found |= {"negative": told} if told else {}
    found |= {"prompt_2": positive["text_g"]} if positive.get("text_g", found["prompt"]) != found["prompt"] else {}
    for key, name in (("seed", "seed"), ("noise_seed", "seed"), ("steps", "steps"), ("cfg", "guidance")):
        found |= {name: inputs[key]} if isinstance(inputs.get(key), int | float) else {}
    if isinstance(inputs.get("sampler_name"), str):
        spacing = str(inputs.get("scheduler", "normal"))
        found["sampler"] = f"{inputs['sampler_name']} {'' if spacing == 'normal' else spacing}".strip()
    size: dict[str, Any] = next((n["inputs"] for n in nodes.values() if n.get("class_type") == "EmptyLatentImage"), {})
    found |= {key: size[key] for key in ("width", "height") if isinstance(size.get(key), int)}
    loras = [n["inputs"] for n in nodes.values() if n.get("class_type") in {"LoraLoader", "LoraLoaderModelOnly"}]
    named = tuple(f"{lora['lora_name']}:{lora.get('strength_model', 1)}" for lora in loras if "lora_name" in lora)
    return found | ({"loras": named} if named else {})


def _upstream(nodes: dict[str, Any], link: list[Any], depth: int = 8) -> dict[str, Any]:
    """The inputs of the node that a link leads to, further back until one has a text."""
    inputs = nodes[link[0]]["inputs"]
    if "text" in inputs or "text_l" in inputs or depth == 0:
        return inputs
    return _upstream(nodes, next(value for value in inputs.values() if isinstance(value, list)), depth - 1)
