"""Every example of a training method runs as it is, for two steps on a small model."""

from pathlib import Path

import pytest

from sdxl_trainer import configfile
from sdxl_trainer.train import train

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
RESULTS = {
    "lora": "pytorch_lora_weights.safetensors",
    "dora": "pytorch_lora_weights.safetensors",
    "lokr": "unet_adapter/adapter_model.safetensors",
    "qlora": "pytorch_lora_weights.safetensors",
    "textual_inversion": "learned_embeds.safetensors",
    "pivotal": "embeddings/thing.safetensors",
    "blora": "pytorch_lora_weights.safetensors",
    "dreambooth": "pytorch_lora_weights.safetensors",
    "dreambooth_prior_prediction": "pytorch_lora_weights.safetensors",
}


@pytest.mark.parametrize("name", RESULTS)
def test_example_trains(name: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "photos"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text("a photo of <thing>")
    small = {
        "output_dir": str(tmp_path / "run"), "model.path": str(base), "data.0.path": str(folder),
        "data.0.resolution": 64, "cache.path": str(tmp_path / "cache"), "cache.workers": 0,
        "train.steps": 2, "train.precision": "fp32",
    }  # fmt: skip
    if name == "lora":
        small |= {"validation.steps": 1, "validation.images": 1}
    if name in {"textual_inversion", "pivotal"}:
        small["token.0.init"] = "red"  # the words of the example are more tokens in the small vocabulary
    if "dreambooth" in name:
        small |= {"data.1.path": str(folder), "data.1.resolution": 64}
    if name == "dreambooth":
        small |= {"data.1.path": str(tmp_path / "class"), "data.1.generate": 2, "data.1.generate_steps": 1}
        small |= {"validation.steps": 1, "validation.images": 1}
    text = (EXAMPLES / f"{name}.toml").read_text()
    path = tmp_path / "example.toml"
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("vae =")))
    output = train(configfile.load(path, [f"{key}={value}" for key, value in small.items()]))
    assert (output / RESULTS[name]).is_file()
