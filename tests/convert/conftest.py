"""A tiny SDXL with adapters for it, and the command line of `sdxl convert`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdxl_trainer import cli
from sdxl_trainer.convert import models, sources
from sdxl_trainer.formats import ADAPTER_FILE, folder, lora
from sdxl_trainer.formats.lora import Adapter, Module


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `sdxl convert` with these words; the exit status."""

    def run(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["sdxl", "convert", *(str(word) for word in words)])
        return cli.guarded(cli.command)

    return run


def adapt(
    base: Path,
    kind: str = "lora",
    parts: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2"),
    **options: float,
) -> Adapter:
    """An adapter with random values on the attention of a model, and on a convolution of its UNet."""
    rank, alpha, seed = int(options.get("rank", 4)), options.get("alpha", 3.0), int(options.get("seed", 0))
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for part in parts:
        for name, weight in sorted(folder.read_weights(part, base).items()):
            wanted = "attn" in name or name == "down_blocks.1.resnets.0.conv1.weight"
            if weight.dim() < 2 or not wanted or not name.endswith(".weight"):
                continue
            down = torch.randn(rank, *weight.shape[1:], generator=draw) * 0.3
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=draw) * 0.3
            tensors = {"lora_down": down, "lora_up": up}
            if kind == "dora":
                tensors["magnitude"] = weight.flatten(1).norm(dim=1) * 1.5
            modules[f"{part}.{name.removesuffix('.weight')}"] = Module("lora", tensors, alpha)
    return Adapter(modules, {}, sources.layout(models.Source("folder", base, "")))


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for the tiny model, by kind, in diffusers' layout."""
    place = tmp_path_factory.mktemp("adapters")
    made = {
        "lora": adapt(base),
        "other": adapt(base, seed=1, rank=2, alpha=2.0, parts=("unet",)),
        "dora": adapt(base, "dora"),
    }
    for name, adapter in made.items():
        lora.write(adapter, place / name / ADAPTER_FILE, "diffusers", {})
    return {name: place / name / ADAPTER_FILE for name in made}
