"""Training on the machine's GPU, or where it has none on one that is made up (tests/made_up_gpu.py): nothing lies on
the wrong side, a step waits for nothing that it need not wait for, and whole runs end as on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_trainer import optim, saver, setup
from sdxl_trainer import train as module
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import CONTINUE, Stop
from sdxl_trainer.sampling import models
from sdxl_trainer.sampling.request import Request
from tests.conftest import CAPTIONS
from tests.made_up_gpu import DEVICE, REAL, a_gpu

ALL = ["unet", "text_encoder", "text_encoder_2"]
MIDDLE = r"unet\.mid_block\..*"
LONG = f"{', '.join(['a red circle'] * 30)} (a:1.3)"
CLASS = [{}, {"caption_only": True, "caption": "a circle", "prior_prediction": True, "regularisation": True}]
TOKEN = {"token": [{"name": "<x>", "vectors": 2}], "data": [{"caption": "a <x>", "caption_only": True}]}
STEPS: dict[str, dict[str, Any]] = {
    "fp32, masks, huber": {
        "train": {"precision": "fp32"},
        "data": [{"mask": "alpha", "unmasked_weight": 0.1, "weight": 0.5}],
        "objective": {"loss": "huber", "delta_schedule": "exponential", "weighting": "debiased"},
    },
    "autocast, noise, timesteps": {
        "objective": {
            "noise_offset": 0.1, "noise_offset_random": True, "noise_offset_adaptive": 0.1, "pyramid_levels": 3,
            "input_perturbation": 0.1, "input_perturbation_random": True, "snr_gamma": 5.0,
        },
        "timesteps": {"density": "logit_normal", "sampling": "sobol", "importance": True, "bias": "later"},
    },
    "v-prediction, zero terminal SNR": {
        "objective": {"prediction": "v_prediction", "zero_terminal_snr": True, "loss": "smooth_l1", "weighting": "p2"},
        "timesteps": {"sampling": "stratified"},
    },
    "fp16": {"train": {"precision": "fp16", "skip_nonfinite": 2}},
    "bf16 weights, averages": {
        "train": {"weights": "bf16"}, "optimizer": {"name": "adamw_bf16"}, "ema": {"enabled": True},
    },
    "bf16 weights, masters": {"train": {"weights": "bf16"}, "optimizer": {"name": "adamw", "master": True}},
    "bf16 weights, SGD": {"train": {"weights": "bf16"}, "optimizer": {"name": "sgd"}},
    "fused backward": {"train": {"fused_backward": True, "batch_size": 1}},
    "prior prediction, micro-batches, half computed again": {
        "train": {"micro_batch": 1, "gradient_checkpointing": 0.5},
        "ema": {"enabled": True},
        "data": [{**data, "crop": "random", "flip": True} for data in CLASS],
    },
    "text encoders, long captions": {
        "learn": [{"match": ".*"}],
        "data": [{"caption": LONG, "caption_only": True, "emphasis": True}],
        "text": {"long_captions": "kohya", "emphasis": "a1111", "drop_encoder_1": 0.5},
        "train": {"gradient_checkpointing": True},
    },
    "text encoders in the step": {"text": {"cache": False, "drop_encoder_2": 0.5}, "data": [{"caption_dropout": 0.5}]},
    "LoRA that drops": {"adapter": {"rank": 2, "dropout": 0.2}},
    "LoRA that drops, text encoders, prior prediction": {
        "adapter": {"rank": 2, "dropout": 0.2, "parts": ALL}, "data": CLASS,
    },
    "LoRA, fp8 under fp16": {
        "adapter": {"rank": 2}, "train": {"frozen": "fp8", "precision": "fp16", "gradient_checkpointing": True},
    },
    "DoRA, int8": {"adapter": {"kind": "dora", "rank": 2, "targets": MIDDLE}, "train": {"frozen": "int8"}},
    "LoHa": {"adapter": {"kind": "loha", "rank": 2, "targets": MIDDLE}},
    "LoKr": {"adapter": {"kind": "lokr", "rank": 2, "targets": MIDDLE}},
    "new words": {**TOKEN, "adapter": {"rank": 2}, "learn": [{"match": ".*token.*", "until": 0.6}, {"match": ".*"}]},
}  # fmt: skip
# What steps do wait for: whether they are finite, where the optimizer's kernels cannot look, and what libraries read.
LOOK = "not bool(state.broken)"
WAITING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    name: ({"optimizer": {"name": name}}, (LOOK,)) for name in ("adafactor", "came", "lion", "muon", "schedulefree")
}
WAITING["adamw8bit"] = ({"optimizer": {"name": "adamw8bit"}}, (LOOK, "synchronize", "name2qmap"))
WAITING["prodigy"] = ({"optimizer": {"name": "prodigy"}, "train": {"learning_rate": 1.0}}, (LOOK, "prodigy.py"))
WAITING["fused backward, Adafactor"] = (
    {"train": {"fused_backward": True, "batch_size": 1, "weights": "bf16"}, "optimizer": {"name": "adafactor"}},
    (LOOK,),
)
WAITING["fused backward, fp16"] = (
    {"train": {"fused_backward": True, "batch_size": 1, "precision": "fp16"}, "optimizer": {"name": "adamw"}},
    ("scaler.get_scale()", "torch.isfinite(norm)", "scaler.step(optimizer)"),
)
# peft turns by the solution of linear equations, of which PyTorch looks whether there is one.
TURNS: dict[str, dict[str, Any]] = {
    "OFT": {"kind": "oft", "block_size": 8, "targets": MIDDLE + "attn.*"},
    "BOFT": {"kind": "boft", "targets": MIDDLE},
}
WAITING |= {
    name: ({"adapter": adapter, "optimizer": {"name": "adamw"}}, ("linalg.solve",)) for name, adapter in TURNS.items()
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from sdxl_trainer.blueprint import build

    folder, kinds = tmp_path_factory.mktemp("kinds"), ("refiner", "inpainting")
    return {kind: build(folder / kind, "tiny", captions=CAPTIONS, kind=kind) for kind in kinds}  # type: ignore[arg-type]


@pytest.fixture
def made(config: Callable[..., Config], bases: dict[str, Path]) -> Callable[..., Config]:
    """The config of a run of two steps in bf16, on a base of a kind."""

    def make(kind: str = "base", **sections: Any) -> Config:
        plain = {"steps": 2, "checkpoint_every": 0, "precision": "bf16", "batch_size": 2}
        model = {"model": {"path": str(bases[kind])}} if kind in bases else {}
        bf16 = {"precision": "auto"} if sections.get("train", {}).get("weights") else {}
        return config(**model, **{**sections, "train": {**plain, **bf16, **sections.get("train", {})}})

    return make


@contextmanager
def steps_on_a_gpu() -> Iterator[list[str]]:
    """Gives what steps wait for."""
    original, found = module.train_step, list[str]()

    def noted(*arguments: Any) -> Any:
        before = len(waits)
        taken = original(*arguments)
        found.extend(what for what in waits[before:] if what not in found)
        return taken

    with a_gpu() as waits, patch.object(module, "train_step", noted):
        yield found


def waited(options: Config) -> list[str]:
    """What the steps of a run wait for."""
    with steps_on_a_gpu() as found:
        job = setup.prepare_job(options, CONTINUE)
        assert job is not None
        try:
            module._loop(job, Stop())
        finally:
            for closing in (job.saver, job.metrics, job.validation):
                closing.close()
        assert all(p.is_cuda for p in job.run.sdxl.parameters())
        assert all(t.is_cuda or t.dim() == 0 for s in job.run.optimizer.state.values() for t in tensors(s))
    assert job.state.step == 2
    return found


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing(made: Callable[..., Config], name: str) -> None:
    assert waited(made(**STEPS[name])) == []


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_waits_for_no_more_than_is_known(made: Callable[..., Config], name: str) -> None:
    sections, known = WAITING[name]
    pytest.importorskip(optim.KINDS[sections["optimizer"]["name"]].place.partition(":")[0].partition(".")[0])
    found = waited(made(**sections))
    assert [what for what in found if not any(part in what for part in known)] == []
    if not REAL:  # of which PyTorch does not tell of all waiting
        assert [part for part in known if not any(part in what for what in found)] == []


def test_a_run_on_a_gpu_is_that_on_a_cpu(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validation pictures, held-out losses, averages, checkpoints, and resumed."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    everything = {
        "data": [{"held_out": 0.3, "flip": True}],
        "validation": {"prompts": ["a red circle"], "images": 1, "steps": 2, "loss_every": 1, "keep_best": True},
        "ema": {"enabled": True},
    }
    runs, rows, pictures = {}, {}, {}
    for place in ("cpu", "cuda"):
        sections = {**everything, "output_dir": str(tmp_path / place), "cache": {"path": str(tmp_path / place)}}
        runs[place] = [config(**sections, train={"steps": n, "precision": "fp32"}) for n in (2, 3)]
    with monkeypatch.context() as alone:
        alone.setenv("ACCELERATE_USE_CPU", "true")
        for options in runs["cpu"]:
            module.train(options)
    with a_gpu():
        for options in runs["cuda"]:
            module.train(options)
    for place in runs:
        rows[place] = read_metrics(tmp_path / place / "metrics.jsonl")
        drawn = Image.open(tmp_path / place / "samples" / "step-000003" / "0-0.png")
        pictures[place] = np.asarray(drawn).astype(int)
    for one, other in zip(rows["cpu"], rows["cuda"], strict=True):
        for key in ("loss", "grad_norm", "validation_loss"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)
    assert np.abs(pictures["cpu"] - pictures["cuda"]).max() <= 1


RUNS: dict[str, dict[str, Any]] = {
    "refiner": {"kind": "refiner"},
    "inpainting": {"kind": "inpainting", "data": [{"held_out": 0.3}]},
    "adapters, bf16 VAE": {"adapter": {"rank": 2, "parts": ALL}, "cache": {"vae_precision": "bf16"}},
    "bf16 weights": {"train": {"weights": "bf16"}, "optimizer": {"name": "adamw_bf16"}},
}


@pytest.mark.parametrize("name", RUNS)
def test_whole_runs(made: Callable[..., Config], pictures: Path, tmp_path: Path, name: str) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(mask)
    validation: dict[str, Any] = {"prompts": ["a red circle"], "images": 1, "steps": 2}
    validation |= {"image": str(pictures / "0.png")} if "kind" in RUNS[name] else {}
    validation |= {"mask": str(mask), "height": 64, "width": 64} if name == "inpainting" else {}
    with steps_on_a_gpu() as found:
        output = module.train(made(**{"validation": validation, **RUNS[name]}))
    assert found == []
    assert (output / "samples" / "step-000002" / "0-0.png").is_file()
    assert all(np.isfinite(row["loss"]) for row in read_metrics(output / "metrics.jsonl"))


@pytest.mark.parametrize("offload", [None, "model", *(["sequential"] if REAL else [])])
def test_prompts_are_read_on_a_gpu_that_has_not_all_weights(base: Path, offload: str | None) -> None:
    request = Request("a (red:1.3) circle", seed=0, emphasis="a1111")
    plain = models.conditions(models.load(str(base)), request) if not REAL else {}
    with a_gpu():
        found = models.conditions(models.load(str(base), offload), request)
        assert all(tensor.is_cuda for tensor in found.values())
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name].cpu(), tensor, atol=0.05, rtol=0.05)  # in bf16


def test_class_pictures_are_drawn_on_a_gpu(made: Callable[..., Config], tmp_path: Path) -> None:
    drawn = {"path": str(tmp_path / "class"), "caption": "a circle", "generate": 3, "generate_steps": 2}
    with a_gpu():
        module.train(made(data=[{}, {**drawn, "regularisation": True}]))
    assert len(list((tmp_path / "class").glob("*.png"))) == 3


def test_what_lies_on_a_gpu_is_copied_into_few_large_pieces_of_memory(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "SLAB", 256)
    kept = saver.Saver(config(), tmp_path, print)
    shapes = ((3,), (5, 5), (), (0, 4), (9, 30), (2, 2))
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float32, torch.bool)
    with a_gpu():
        given = [torch.full(shape, 1, dtype=kind, device=DEVICE) for shape, kind in zip(shapes, kinds, strict=True)]
        copies = [kept._kept(str(number), tensor) for number, tensor in enumerate(given)]
        again = [kept._kept(str(number), tensor) for number, tensor in enumerate(given)]
        for tensor, copy, same in zip(given, copies, again, strict=True):
            assert not copy.is_cuda
            assert copy.data_ptr() == same.data_ptr()
            assert torch.equal(copy, tensor.cpu())
    kept.close()
    sizes = sorted({copy.untyped_storage().nbytes() for copy in copies})
    assert sizes == [256, 9 * 30 * 4]


def test_fused_kernels_want_gradients_laid_out_as_their_weights() -> None:
    with a_gpu():
        weight = torch.nn.Parameter(torch.zeros(2, 3, 4, 4, device=DEVICE))
        weight.grad = torch.zeros(2, 4, 4, 3, device=DEVICE).permute(0, 3, 1, 2)
        with pytest.raises(RuntimeError, match="must have same dtype"):
            torch.optim.AdamW([weight], fused=True).step()


def test_bf16_weights_are_refused_where_a_gpu_has_no_bf16(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config(train={"weights": "bf16"}, optimizer={"name": "adamw_bf16"})
    with a_gpu():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
        with pytest.raises(UserError, match="a GPU that has no bf16"):
            setup.computing(options, [])
        assert setup.computing(config(train={"precision": "bf16"}), []) == "fp16"
