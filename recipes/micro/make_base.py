"""Put together what micro-SDXL's UNet is trained with: tokenizers, text encoders, VAE and scheduler.

    python recipes/micro/make_base.py OUT --vae VAE --tokenizers TOKENIZERS --text TEXT

VAE is the folder `final` of train_vae.py, TOKENIZERS what make_tokenizers.py wrote, TEXT what train_text.py wrote.
OUT becomes a diffusers folder without a UNet, which base.toml describes and begins with random weights. Its scheduler
ends in pure noise and the UNet is to predict v, so that backgrounds can become truly black and white (Lin et al. 2024).
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdxl_trainer import files, text, untrained
from sdxl_trainer.blueprint import TextSize, text_changes
from sdxl_trainer.formats import folder

SIZES = {
    "text_encoder": TextSize(64, layers=2, heads=2, intermediate=128, projection=64),
    "text_encoder_2": TextSize(128, layers=3, heads=4, intermediate=256, projection=128),
}
SCHEDULER = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
TOKEN_DEVIATION, POSITION_DEVIATION = 0.5, 0.1  # CLIP's own 0.02 leaves the UNet nothing to attend to for long


def vocabulary(tokenizer: Path) -> dict[str, int]:
    """The entries of a text encoder's configuration that its tokenizer decides."""
    ids = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    names = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {f"{kind}_token_id": ids[names[f"{kind}_token"]] for kind in ("bos", "eos", "pad")}
    return {"vocab_size": len(ids), **special}


def described(sizes: dict[str, TextSize], tokenizers: Path) -> dict[str, dict[str, Any]]:
    """The configuration of each text encoder: SDXL's own with other sizes and the tokenizers' vocabularies."""
    found = {name: folder.read_config(name) | text_changes(size) for name, size in sizes.items()}
    for name, config in found.items():
        config |= vocabulary(tokenizers / name.replace("text_encoder", "tokenizer")) | {"torch_dtype": "float32"}
    return found


def random_encoder(name: str, config: dict[str, Any], seed: int) -> nn.Module:
    """A text encoder with weights to begin with."""
    return untrained.begun(name, config, seed, text_deviation)


def text_deviation(parameter: str, weight: Tensor) -> float | None:
    """Standard deviation of a weight of a text encoder; None: as transformers makes it."""
    if "token_embedding" in parameter:
        return TOKEN_DEVIATION
    if "position_embedding" in parameter:
        return POSITION_DEVIATION
    return weight.shape[1] ** -0.5 if weight.ndim == 2 else None


def write_part(out: Path, name: str, config: dict[str, Any], module: nn.Module) -> None:
    """A part's weights and configuration, as diffusers and transformers write them."""
    folder.write_tensors(out / name / folder.WEIGHTS[name], folder.published_names(name, module.state_dict()))
    files.write_json(out / name / folder.CONFIGS[name], config)


def make(out: Path, vae: Path, tokenizers: Path, encoders: Path) -> Path:
    """Write the folder; the same arguments write the same bytes. `model_index.json` comes last."""
    (out / folder.INDEX).unlink(missing_ok=True)
    for name in folder.TOKENIZERS:
        shutil.copytree(tokenizers / name, out / name, dirs_exist_ok=True)
    for name, source in [("vae", vae), *((name, encoders / name) for name in text.PARTS)]:
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in (folder.CONFIGS[name], folder.WEIGHTS[name]):
            shutil.copyfile(source / file, out / name / file)
    files.write_json(out / "scheduler" / folder.CONFIGS["scheduler"], folder.read_config("scheduler") | SCHEDULER)
    files.write_bytes(out / folder.INDEX, (folder.SHIPPED / folder.INDEX).read_bytes())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Put together what micro-SDXL's UNet is trained with.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.vae, arguments.tokenizers, arguments.text))


if __name__ == "__main__":
    main()
