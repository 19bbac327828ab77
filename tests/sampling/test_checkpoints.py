"""A checkpoint can be drawn with as it is, while the run goes on."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trainer import sample
from sdxl_trainer.errors import UserError
from sdxl_trainer.sampling import checkpoints, models, samplers
from sdxl_trainer.sampling.order import made
from sdxl_trainer.train import train

HOW: dict[str, Any] = {"steps": 2, "height": 64, "width": 64, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CACHE", tmp_path / "models")


def drawn(model: Path, out: Path) -> bytes:
    (path,) = sample.run(made(str(model), HOW, ["a red circle"]), out)
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.parametrize("averaged", [False, True], ids=["raw", "ema"])
def test_it_draws_what_the_result_draws(config: Callable[..., Any], tmp_path: Path, averaged: bool) -> None:
    made = config(
        train={"steps": 2, "checkpoint_every": 1, "learning_rate": 1e-2},
        ema={"enabled": averaged},
        objective={"prediction": "v_prediction", "zero_terminal_snr": True},
    )
    output = train(made)
    last = drawn(output / "checkpoint-2", tmp_path / "last")
    assert last == drawn(output, tmp_path / "result")
    assert last != drawn(output / "checkpoint-1", tmp_path / "first")


def test_a_run_of_an_adapter_and_its_checkpoints_draw_with_their_base(
    config: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    rates = {"steps": 2, "checkpoint_every": 1, "learning_rate": 1e-1}
    data = [{"caption_suffix": " <x>"}]
    output = train(config(train=rates, data=data, adapter={"rank": 2}, token=[{"name": "<x>"}]))
    (request,) = [request for _, request in made(str(output), HOW | {"loras": ("other:0.5",)}, ["a"]).pictures]
    assert request.model == str(base)
    assert (request.loras, request.embeddings) == ((str(output), "other:0.5"), (str(output),))
    result, last = drawn(output, tmp_path / "a"), drawn(output / "checkpoint-2", tmp_path / "b")
    assert result == last
    assert len({result, drawn(output / "checkpoint-1", tmp_path / "c"), drawn(base, tmp_path / "d")}) == 3
    (output / "config.toml").unlink()
    with pytest.raises(UserError, match="no diffusers model") as caught:
        drawn(output, tmp_path / "out")
    assert "give the base it was made for" in caught.value.fix


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DPMSolverSinglestepScheduler", "DDIMScheduler"])
def test_a_scheduler_that_cannot_begin_without_signal_gives_way(
    config: Callable[..., Any], base: Path, tmp_path: Path, kind: str
) -> None:
    """It would pass over `rescale_betas_zero_snr`, and draw from other noise than was trained."""
    from diffusers import StableDiffusionXLPipeline

    own = shutil.copytree(base, tmp_path / "own")
    for name, change in (
        ("scheduler/scheduler_config.json", {"_class_name": kind}),
        ("model_index.json", {"scheduler": ["diffusers", kind]}),
    ):
        (own / name).write_text(json.dumps(json.loads((own / name).read_text()) | change))
    objective = {"prediction": "v_prediction", "zero_terminal_snr": True}
    output = train(config(model={"path": str(own)}, objective=objective, train={"steps": 1, "checkpoint_every": 1}))
    checkpoint = models.checkpoints.assembled(output / "checkpoint-1", tmp_path / "models")
    for model in (output, checkpoint):
        saved = json.loads((model / "scheduler/scheduler_config.json").read_text())
        schedulers = [samplers.scheduler(saved, None), StableDiffusionXLPipeline.from_pretrained(model).scheduler]
        for scheduler in schedulers:
            assert scheduler.alphas_cumprod[-1] < 1e-6
            assert scheduler.config.timestep_spacing == "trailing"
            assert (type(scheduler).__name__ == kind) == (kind == "DDIMScheduler")


def test_schedulers_that_begin_without_signal_are_those_of_diffusers() -> None:
    import diffusers

    kinds = {name: getattr(diffusers, name) for name in checkpoints.FROM_ZERO}
    kinds |= {sampler.kind: getattr(diffusers, sampler.kind) for sampler in samplers.SAMPLERS.values()}
    for name, kind in kinds.items():
        takes = "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters
        assert takes == (name in checkpoints.FROM_ZERO), name
