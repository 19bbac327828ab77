"""Train both text encoders of micro-SDXL as CLIP is trained: captions against pictures, from random weights.

    python recipes/micro/train_text.py OUT --tokenizers TOKENIZERS [--config recipes/micro/text.toml]

TOKENIZERS is what make_tokenizers.py wrote. OUT gets `text_encoder/` and `text_encoder_2/` as transformers writes
them, and `log.jsonl`. It takes minutes; what step k sees is a function of (seed, k) alone. A small convolutional
network stands on the side of the pictures and is thrown away (Radford et al. 2021, section 2.3: symmetric InfoNCE).
"""

import argparse
import json
import math
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

import make_base
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

import toyworld
from sdxl_trainer import text
from sdxl_trainer.formats import folder

Config = dict[str, Any]
SIDE = 64  # pixels of the thumbnails that the captions are compared with


class Pairs(nn.Module):
    """Both text encoders, each with a head on its side and one on the side of the pictures."""

    def __init__(self, encoders: dict[str, nn.Module], width: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        sizes = {name: encoder.config.projection_dim for name, encoder in encoders.items()}
        sizes["text_encoder"] = encoders["text_encoder"].config.hidden_size  # it has no projection of its own
        self.pictures = nn.Sequential(
            *(nn.Conv2d(3, 64, 4, stride=4), nn.GELU()),
            *(nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(96, 128, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Flatten(), nn.Linear(128 * (SIDE // 16) ** 2, width), nn.GELU(), nn.LayerNorm(width)),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(2.0)) for name in sizes})

    def forward(self, tokens: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Similarities [B, B] of captions (token ids [B, 2, n]) to pictures ([B, 3, 64, 64] in -1..1), per encoder."""
        seen = self.pictures(pixels)
        found = {}
        for index, (name, encoder) in enumerate(self.encoders.items()):
            output = encoder(tokens[:, index])
            said = output.pooler_output if name == "text_encoder" else output.text_embeds
            scale = self.scales[name].exp().clamp(max=100)
            found[name] = scale * functional.normalize(said, dim=-1) @ functional.normalize(self.heads[name](seen)).T
        return found


def batch_of(tokenizers: tuple[Any, Any], seed: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Token ids and pixels of scenes `first`, `first + 1`, ...; no held-out combination among them."""
    scenes = [toyworld.scene(seed, index, holdout=False) for index in range(first, first + count)]
    captions = [toyworld.caption(scene, seed, first + i, terse=0.1) for i, scene in enumerate(scenes)]
    drawn = np.stack([toyworld.draw(scene, (SIDE, SIDE)) for scene in scenes])
    # The encoders read from left to right: what would stand behind the longest caption's end changes nothing before it.
    tokens = [tokenizer(captions, padding="longest", return_tensors="pt").input_ids for tokenizer in tokenizers]
    return torch.stack(tokens, 1), torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def losses(similarities: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The loss of each encoder, and how often a caption's own picture is the most similar one."""
    found, hits = {}, {}
    for name, similarity in similarities.items():
        own = torch.arange(len(similarity))
        found[name] = (functional.cross_entropy(similarity, own) + functional.cross_entropy(similarity.T, own)) / 2
        hits[name] = (similarity.argmax(1) == own).float().mean().item()
    return found, hits


def train(config: Config, described: dict[str, Config], tokenizers: Path, log: Path) -> dict[str, nn.Module]:
    """Train; gives the two text encoders. `described`: the configuration of each."""
    steps, size = config["steps"], config["batch"]
    encoders = {
        name: make_base.random_encoder(name, described[name], config["seed"] + index)
        for index, name in enumerate(text.PARTS)
    }
    readers = tuple(CLIPTokenizer.from_pretrained(tokenizers / name) for name in folder.TOKENIZERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        model = Pairs(encoders, config["width"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    unseen = batch_of(readers, config["evaluation_seed"], 0, config["evaluation_pairs"])
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as lines:
        for step in range(steps + 1):
            if step % config["log_every"] == 0 or step == steps:
                with torch.no_grad():
                    found, hits = losses(model(*unseen))
                row = {"step": step, "seconds": round(time.monotonic() - began, 1)}
                row |= {name: {"loss": round(found[name].item(), 4), "found": round(hits[name], 4)} for name in found}
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                print(row, flush=True)
            if step == steps:
                break
            rate = min(1.0, (step + 1) / config["warmup"]) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = config["learning_rate"] * rate
            found, _ = losses(model(*batch_of(readers, config["seed"], step * size, size)))
            sum(found.values(), torch.zeros(())).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return encoders


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the text encoders of micro-SDXL.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("text.toml"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    draft = settings.out.with_name(settings.out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    config = tomllib.loads(settings.config.read_text(encoding="utf-8"))
    described = make_base.described(make_base.SIZES, settings.tokenizers)
    for name, encoder in train(config, described, settings.tokenizers, draft / "log.jsonl").items():
        make_base.write_part(draft, name, described[name], encoder)
    draft.rename(settings.out)


if __name__ == "__main__":
    main()
