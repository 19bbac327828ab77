"""DreamBooth: class pictures that the base draws, and prior prediction, which needs none."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_trainer import distributed, files, setup
from sdxl_trainer.configfile import dumps
from sdxl_trainer.data import loader
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import CONTINUE, Job, Stop
from sdxl_trainer.train import _loop, train

SUBJECT = {"caption": "a red circle", "caption_only": True}
CLASS = {"caption": "a circle", "generate": 5, "generate_steps": 2, "regularisation": True}
KEPT = {"caption": "a circle", "caption_only": True, "prior_prediction": True, "regularisation": True}
LORA = {"rank": 4, "parts": ["unet", "text_encoder", "text_encoder_2"], "dropout": 0.2}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


@pytest.fixture
def prepared() -> Iterator[Callable[[Any], Job]]:
    """Makes the job of a config, ready for its loop."""
    opened: list[Job] = []

    def make(options: Any) -> Job:
        job = setup.prepare_job(options, CONTINUE)
        assert job is not None
        opened.append(job)
        return job

    yield make
    for job in opened:
        job.metrics.close()
        job.validation.close()


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def test_the_nth_class_picture_is_the_same_however_it_comes_about(config: Callable[..., Any], tmp_path: Path) -> None:
    """Drawn at once or one by one, after an interruption, beside pictures that were there: none twice, none lost."""
    from sdxl_trainer.inspect_cache import run

    def drawn(name: str, **more: Any) -> dict[str, np.ndarray]:
        run(config(data=[SUBJECT, CLASS | {"path": str(tmp_path / name)} | more]), verify=False, gc=False)
        return pixels(tmp_path / name)

    whole = drawn("whole", generate_batch=5)
    assert [name[:6] for name in whole] == [f"{number:05}-" for number in range(5)]
    assert len({picture.tobytes() for picture in whole.values()}) == 5
    single = drawn("single", generate_batch=1)
    assert whole.keys() == single.keys()
    # Sums of a batch may differ in their last bits.
    assert max(np.abs(whole[name] - single[name]).max() for name in whole) <= 1
    names = sorted(p for p in (tmp_path / "single").glob("*.png"))
    before = {p: p.stat().st_mtime_ns for p in names}
    names[1].unlink()
    names[3].unlink()
    again = drawn("single", generate_batch=1)
    assert all((again[name] == single[name]).all() for name in single)
    assert all(p.stat().st_mtime_ns == before[p] for p in (names[0], names[2], names[4]))
    (tmp_path / "own").mkdir()
    Image.fromarray(np.zeros((80, 64, 3), np.uint8)).save(tmp_path / "own" / "mine.jpg")
    assert sorted(drawn("own")) == sorted(whole)[:4]
    with pytest.raises(UserError, match="another base, prompt, seed"):
        drawn("own", caption="a square")
    with pytest.raises(UserError, match="holds 5 pictures already"):
        drawn("own", generate=4)


def test_prompts_in_turn_are_the_captions(
    config: Callable[..., Any], prepared: Callable[[Any], Job], tmp_path: Path
) -> None:
    data = CLASS | {"path": str(tmp_path / "class"), "generate_prompts": ["a circle", "a green circle"]}
    del data["caption"]
    job = prepared(config(data=[SUBJECT, data], adapter={"rank": 2}))
    captions = {p.name[:5]: p.captions for p in job.samples.pictures if p.data.generate}
    assert captions == {f"{n:05}": (("a circle",), ("a green circle",))[n % 2] for n in range(5)}


def test_check_says_what_is_to_be_drawn_and_nothing_of_what_is_meant(
    config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One caption for a subject and its pictures seen twice are DreamBooth, and no findings."""
    from sdxl_trainer import check

    class_pictures = CLASS | {"path": str(tmp_path / "class")}
    check.run(config(data=[SUBJECT, class_pictures, KEPT], adapter={"rank": 2}))
    said = capsys.readouterr().out
    assert "5 class pictures of 'a circle' will be drawn first" in said
    assert "the base's prediction as target" in said
    assert "duplicates" not in said
    assert "are the one for all" not in said
    check.run(config(data=[SUBJECT, KEPT], train={"frozen": "bf16"}))
    assert "frozen base (prior_prediction)" in capsys.readouterr().out
    assert not (tmp_path / "class").exists()


def test_killed_while_drawing(config: Callable[..., Any], tmp_path: Path) -> None:
    """The rest is drawn by two processes: together they are what one draws."""
    from sdxl_trainer.inspect_cache import run

    def options(name: str) -> Any:
        return config(data=[SUBJECT, CLASS | {"path": str(tmp_path / name), "generate_batch": 1}])

    path = tmp_path / "parted.toml"
    path.write_text(dumps(options("parted")))
    command = ["-m", "sdxl_trainer", "cache", str(path)]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "parted").glob("*.png"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *command]
    subprocess.run(launch, check=True, capture_output=True)
    run(options("whole"), verify=False, gc=False)
    assert files.tree_hashes(tmp_path / "parted") == files.tree_hashes(tmp_path / "whole")
    assert not list((tmp_path / "parted").glob(".*"))


def test_class_pictures_are_trained_with_their_own_sizes_and_share(
    config: Callable[..., Any], prepared: Callable[[Any], Job], tmp_path: Path
) -> None:
    """Every step of four has two of each, and the class's sizes are those of the pictures that were drawn."""
    data = [SUBJECT | {"repeats": 2.0}, CLASS | {"path": str(tmp_path / "class"), "weight": 0.5}]
    job = prepared(config(data=data, adapter={"rank": 2}, train={"batch_size": 4}))
    assert job.order.steps_per_epoch == 6
    for step in range(12):
        epoch, chosen = job.order.step(step)
        batch = loader.batch(job.samples, epoch, [(sample, True) for sample in chosen])
        drawn = [bool(job.samples.picture(sample).data.generate) for sample in chosen]
        assert sum(drawn) == 2
        for ids, weight, ours in zip(batch.time_ids.tolist(), batch.weight.tolist(), drawn, strict=True):
            assert weight == (0.5 if ours else 1.0)
            assert (ids == [64, 64, 0, 0, 64, 64]) == (ours or ids[:2] == [64, 64])


METHODS: dict[str, dict[str, Any]] = {
    "class pictures, LoRA": {"adapter": LORA},
    "class pictures, full": {"learn": [{"match": r"unet\..*"}, {"match": r"text_encoder\..*"}]},
    "prior prediction, LoRA": {"adapter": LORA},
    "prior prediction, LoKr": {"adapter": {"kind": "lokr", "rank": 4, "targets": "all"}},
    "prior prediction, full": {"ema": {"enabled": True}},
    "prior prediction, full with text": {"learn": [{"match": r"unet\..*"}, {"match": r"text_encoder_2\..*"}]},
}


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bitwise_and_only_what_learns_moves(
    config: Callable[..., Any], prepared: Callable[[Any], Job], tmp_path: Path, name: str
) -> None:
    second = KEPT if name.startswith("prior") else CLASS | {"path": str(tmp_path / "class")}
    options = {**METHODS[name], "data": [{**SUBJECT, "flip": True, "caption_dropout": 0.2}, {**second, "weight": 0.7}]}
    whole = tmp_path / "whole"
    job = prepared(config(**options, output_dir=str(whole)))
    before = {n: p.detach().clone() for n, p in job.run.sdxl.named_parameters()}
    kept = {} if job.run.prior is None else {n: p.clone() for n, p in job.run.prior.sdxl.state_dict().items()}
    _loop(job, Stop())
    moved = {n for n, p in job.run.sdxl.named_parameters() if not torch.equal(p, before[n])}
    learns = {n for group in job.run.groups for n in group.names}
    assert moved
    assert moved <= learns
    if job.run.prior is not None and not job.run.sdxl.added:
        assert all(torch.equal(p, kept[n]) for n, p in job.run.prior.sdxl.state_dict().items())
    parted = tmp_path / "parted"
    train(config(**options, output_dir=str(parted), train={"steps": 2}))
    train(config(**options, output_dir=str(parted)))
    assert losses(parted) == losses(whole)
    for one in sorted((whole / "checkpoint-4").rglob("*.safetensors")):
        first, other = load_file(one), load_file(parted / one.relative_to(whole))
        assert all(torch.equal(first[key], other[key]) for key in first | other)


@pytest.mark.parametrize("method", [{"adapter": LORA}, {}], ids=["LoRA", "full"])
def test_prior_prediction_keeps_what_the_base_says(
    config: Callable[..., Any], prepared: Callable[[Any], Job], method: dict, tmp_path: Path
) -> None:
    """At first there is nothing to keep from changing; after steps the target is still the base's, and not that of
    the model that learns; micro-batches change nothing."""
    data = [SUBJECT, KEPT]
    found = {}
    for name, sizes in (("whole", {}), ("micro", {"micro_batch": 1})):
        options = config(data=data, train={"batch_size": 4, **sizes}, output_dir=str(tmp_path / name), **method)
        job = prepared(options)
        assert job.run.prior is not None
        batch = loader.batch(job.samples, 0, [(sample, True) for sample in job.order.step(0)[1]])
        batch = batch.to(job.run.accelerator.device, job.run.dtype)
        assert batch.prior is not None
        assert len(batch.prior) == 2
        noisy, level = torch.randn(batch.noise.shape), job.run.objective.schedule.level(batch.timesteps)
        asked = (batch, noisy, level, job.run.accelerator.autocast)
        rows, base = job.run.prior(*asked)  # type: ignore[misc]
        with torch.no_grad():
            live = job.run.sdxl.eval()(noisy, level, batch.time_ids, **batch.text)[rows]
        torch.testing.assert_close(live, base, rtol=1e-4, atol=1e-5)
        job.run.sdxl.train()
        _loop(job, Stop())
        after = job.run.prior(*asked)[1]  # type: ignore[index]
        assert torch.equal(after, base)
        with torch.no_grad():
            moved = job.run.sdxl.eval()(noisy, level, batch.time_ids, **batch.text)[rows]
        assert (moved - base).abs().max() > 1e-3
        found[name] = losses(tmp_path / name)
    assert found["micro"] == pytest.approx(found["whole"], rel=1e-4)


def test_weights_are_the_reference_s_sum_of_two_means() -> None:
    """mean(instance) + prior_loss_weight * mean(class), of a batch that is half and half."""
    loss, prior_weight = torch.rand(8), 0.3
    theirs = loss[:4].mean() + prior_weight * loss[4:].mean()
    weights = torch.tensor([2.0] * 4 + [2.0 * prior_weight] * 4)
    torch.testing.assert_close((loss * weights).sum() / 8, theirs)


def test_the_copy_of_a_base_in_bf16_computes_in_fp32_where_the_cpu_has_no_bf16(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {}
    for has in (True, False):
        monkeypatch.setattr(distributed, "_cpu_has_bf16", lambda has=has: has)
        sizes = {"weights": "bf16", "steps": 1, "checkpoint_every": 0}
        output = train(config(data=[SUBJECT, KEPT], train=sizes, output_dir=str(tmp_path / str(has))))
        found[has] = read_metrics(output / "metrics.jsonl")[-1]["loss"]
    assert found[False] == pytest.approx(found[True], rel=0.02)
