"""What docs/security.md promises, where no other test shows it."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import manifest, optim
from sdxl_trainer.config import Optimizer
from sdxl_trainer.configfile import validated
from sdxl_trainer.errors import UserError
from sdxl_trainer.train import train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that leaves a mark when it is imported; it is the working folder."""
    (tmp_path / "evil.py").write_text(
        "import torch\nopen('mark', 'w').close()\nclass Model(torch.optim.SGD):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_config_cannot_name_code_that_lies_about(evil: Path) -> None:
    with pytest.raises(UserError, match="not of an installed package"):
        optim.refuse(Optimizer(name="evil:Model"), validated_train(), __import__("torch").device("cpu"))
    assert not (evil / "mark").exists()


def validated_train() -> Any:
    from sdxl_trainer.config import Train

    return Train(steps=1)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_model_folder_cannot_name_code(config: Callable[..., Any], base: Path, evil: Path, part: str) -> None:
    model = evil / "model"
    shutil.copytree(base, model)
    shutil.copy(evil / "evil.py", model / part / "evil.py")
    path = model / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    told = json.loads(path.read_text(encoding="utf-8"))
    mapped = {name: "evil.Model" for name in ("AutoModel", "AutoConfig", "AutoTokenizer", "CLIPTextModel")}
    path.write_text(json.dumps(told | {"auto_map": mapped, "custom_pipelines": "evil"}), encoding="utf-8")
    try:
        train(config(model={"path": str(model)}, cache={"path": str(evil / "cache")}, train={"steps": 1}))
    except UserError:
        pass
    assert not (evil / "mark").exists()


def test_a_pickle_is_not_opened(config: Callable[..., Any], base: Path, evil: Path) -> None:
    model = evil / "model"
    shutil.copytree(base, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    pickled = b"cbuiltins\nopen\n(S'mark'\nS'w'\ntR."
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        (model / "unet" / name).write_bytes(pickled)
        with pytest.raises(UserError):
            train(config(model={"path": str(model)}))
    assert not (evil / "mark").exists()


def test_a_run_on_files_asks_no_network(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: connect(None, a))  # type: ignore[arg-type]
    train(config(validation={"prompts": ["a red circle"], "images": 1, "steps": 2}, train={"steps": 1}))
    assert asked == []


@pytest.mark.parametrize("folder", ["/tmp/logs", "../logs", "a/../../logs", "~/logs"])
def test_logs_cannot_leave_the_output_folder(tree: Callable[..., dict[str, Any]], folder: str) -> None:
    with pytest.raises(UserError, match="below output_dir"):
        validated(tree(log={"dir": folder, "trackers": ["tensorboard"]}), "test.toml")


SECRET = "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"


def test_tokens_are_in_no_file_of_a_run(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("sys.argv", ["train.py", f"--hub_token={SECRET}", "--wandb-key", SECRET, "--steps", "1"])
    train(config(log={"trackers": ["tensorboard"]}, train={"steps": 1, "checkpoint_every": 1}))
    found = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert found == []
    assert SECRET not in "".join(capfd.readouterr())
    assert manifest.command(["x", "--hub_token", SECRET, "--y"]) == ["x", "--hub_token", "***", "--y"]


def test_nothing_in_the_code_opts_into_running_others_code() -> None:
    forbidden = re.compile(r"trust_remote_code\s*=\s*True|weights_only\s*=\s*False|\bpickle\.|yaml\.(unsafe_)?load\(")
    for path in (ROOT / "sdxl_trainer").rglob("*.py"):
        assert not forbidden.search(path.read_text(encoding="utf-8")), path
