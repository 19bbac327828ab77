"""What caption variants, chunks and text encoders in the step cost.

Floating-point operations of a full-size SDXL are counted on tensors without values, so they are the same on every
machine; the times of making and tokenizing variants are this machine's.

    python benchmarks/captions.py [--captions 2000] [--latent 128]
"""

import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trainer import blueprint, text
from sdxl_trainer.config import Data, TextOptions
from sdxl_trainer.data import captions
from sdxl_trainer.data.records import Record
from sdxl_trainer.formats import folder, vocabulary

POSITIONS = (77, 154, 231, 462, 924)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--captions", type=int, default=2000)
    parser.add_argument("--latent", type=int, default=128, help="side of the latents")
    options = parser.parse_args()
    result = {"latent": options.latent, **operations(options.latent), **speeds(options.captions)}
    common.write("captions", result)
    print(json.dumps(result, indent=1))


def operations(latent: int) -> dict[str, Any]:
    """Tera-operations of forward passes for one picture and one chunk."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = blueprint.configs(blueprint.SIZES["sdxl"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        first = CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder_2"]))
        ids = torch.zeros(1, 2, 77, dtype=torch.long)
        encoding = counted(partial(text.embed, (first, second), ids))
        by_positions = {}
        for positions in POSITIONS:
            states, noisy = torch.empty(1, positions, 2048), torch.empty(1, 4, latent, latent)
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.zeros(1, 6)}
            by_positions[positions] = counted(partial(unet, noisy, torch.zeros(1), states, added_cond_kwargs=added))
    row = 77 * 2048 + 1280
    return {
        "encoders_tera_operations": encoding,
        "unet_tera_operations": by_positions,
        "encoding_share_of_a_step": encoding / (3 * by_positions[77]),  # backward is twice forward
        "unet_more": {n: value / by_positions[77] - 1 for n, value in by_positions.items()},
        "cache_bytes_per_chunk_16_bits": row * 2,
        "encoders_bytes_16_bits": 2 * sum(p.numel() for model in (first, second) for p in model.parameters()),
    }


def counted(run: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 1e12


def speeds(count: int) -> dict[str, Any]:
    """Variants made and tokenized per second, of captions of 20 tags, in one thread."""
    draw = random.Random(0)
    merges = vocabulary.clip_merges()
    words = [
        left + right for left, right in merges if (left + right).endswith("</w>") and (left + right)[:-4].isalpha()
    ]
    tags = [word.removesuffix("</w>") for word in words]
    records = [(0, Record(str(i), (", ".join(draw.sample(tags, 20)),), bytes, "")) for i in range(count)]
    data = Data(path="x", shuffle_tags=True, tag_dropout=0.1, keep_tags=1)
    began = time.perf_counter()
    prompts = [prompt for choice in captions.Choices([data], records) for prompt in choice.prompts()]
    made = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as place:
        for name in folder.TOKENIZERS:
            vocabulary.write(Path(place) / name, merges, folder.SHIPPED / name)
        from transformers import CLIPTokenizer

        both = tuple(CLIPTokenizer.from_pretrained(Path(place) / name) for name in folder.TOKENIZERS)
        began = time.perf_counter()
        text.tokenize((both[0], both[1]), prompts, TextOptions())
    read = time.perf_counter() - began
    return {"variants_per_second": len(prompts) / made, "tokenized_per_second": len(prompts) / read}


if __name__ == "__main__":
    main()
