"""Memory that is predicted: what the counting counts, and that fake tensors take what real ones take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sdxl_trainer import base as bases
from sdxl_trainer import blueprint, configfile, kernels, memory, model, optim, parameters, presets, setup, text
from sdxl_trainer import unet as unets
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.optim import backward
from sdxl_trainer.train import train


def test_live_counts_storages_and_not_views() -> None:
    weight = torch.zeros(10, 10)
    with memory.Live([weight]) as live:
        kept = weight @ weight
        view = kept.t()[2:]
        assert live.now == live.peak == 400
        more = torch.ones(50)
        assert (live.now, live.peak) == (600, 600)
        del more
        assert (live.now, live.peak) == (400, 600)
        del kept
        assert live.now == 400  # the view holds it
        del view
        assert live.now == 0


def skeleton(config: Any) -> tuple[model.SDXL, list[parameters.Group]]:
    base = bases.resolve(config.model, Path(config.output_dir))
    sdxl = model.skeleton(base, parameters.text_learns(config, text.parameter_names(base)))
    setup.inject(sdxl, config, base, None)
    return sdxl, groups_of(config, sdxl)


def groups_of(config: Any, sdxl: model.SDXL) -> list[parameters.Group]:
    return parameters.apply_rules(sdxl, parameters.rules(config), config.train, config.optimizer, sdxl.closed())


TEXT = [{"match": r"unet\..*"}, {"match": r"text_encoder.*"}]
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "checkpointing of a third": {"train": {"gradient_checkpointing": 0.33}},
    "fused backward": {"train": {"fused_backward": True}},
    "fused backward, checkpointing": {"train": {"fused_backward": True, "gradient_checkpointing": True}},
    "bf16": {"train": {"weights": "bf16"}, "optimizer": {"name": "adamw_bf16"}},
    "bf16, adafactor": {
        "train": {"weights": "bf16", "fused_backward": True, "gradient_checkpointing": True},
        "optimizer": {"name": "adafactor"},
    },
    "adapter": {"adapter": {"rank": 4}},
    "text encoders": {"learn": TEXT},
    "text encoders, checkpointing": {"learn": TEXT, "train": {"gradient_checkpointing": True}},
    "new words": {"token": [{"name": "<x>", "vectors": 2}]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_pass_of_fake_tensors_takes_what_a_real_one_takes(
    config: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    chosen = config(**CASES[name])
    sdxl, _ = skeleton(chosen)
    dtype = DTYPES[chosen.train.weights]
    setting = memory.Step((2, 8, 6), chosen.train.weights, "cpu")
    found = memory.working(chosen, sdxl, setting)
    base = bases.resolve(chosen.model, tmp_path)
    checkpointing, learns = chosen.train.gradient_checkpointing, sdxl.text_encoder is not None
    real = model.load(chosen.model, base, None, dtype, checkpointing, learns)
    setup.inject(real.train(), chosen, base, None)
    learning = {n for n, p in sdxl.named_parameters() if p.requires_grad}
    for key, parameter in real.named_parameters():
        parameter.requires_grad_(key in learning)
    noisy, timesteps = torch.zeros(2, 4, 8, 6, dtype=dtype), torch.zeros(2)
    given: dict[str, Any] = {"time_ids": torch.zeros(2, 6, dtype=torch.int64)}
    if learns:
        ids, rows = torch.zeros(2, 2, 77, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
        given |= {"tokens": ids, "chunks": rows, "kept": torch.ones(2, 2)}
    else:
        given |= {"prompt_embeds": torch.zeros(2, 77, 64, dtype=dtype), "pooled": torch.zeros(2, 40, dtype=dtype)}
    with memory.Live([*real.parameters(), *real.buffers(), noisy, timesteps, *given.values()]) as live:
        loss = real(noisy, timesteps, **given).float().square().mean()
        if chosen.train.fused_backward:
            optimizer = optim.make(groups_of(chosen, real), chosen.optimizer)
            optimizer.step = lambda: None  # type: ignore[method-assign]
            backward.step(optimizer, [p for p in real.parameters() if p.requires_grad], loss, None, loss.backward)
        else:
            loss.backward()
    # What the fake pass is given may count as its own.
    here = sum(t.numel() * t.element_size() for t in (noisy, timesteps, *given.values()))
    assert 0.99 * live.peak <= found <= 1.01 * (live.peak + here)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_autocast_of_gpus_keeps_what_norms_take_in_fp32(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    chosen = config(train={"gradient_checkpointing": share})
    sdxl, _ = skeleton(chosen)
    found = memory.working(chosen, sdxl, memory.Step((2, 32, 24), "bf16", "cuda"))
    real = model.load(chosen.model, bases.resolve(chosen.model, tmp_path), None, torch.float32, share, False).train()

    def in_fp32(norm: Any) -> Any:
        def called(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return norm(x.float(), *rest)

        return called

    for name in ("layer_norm", "group_norm"):
        monkeypatch.setattr(F, name, in_fp32(getattr(F, name)))
    monkeypatch.setattr(kernels, "stands_for", "cuda")
    given = {"time_ids": torch.zeros(2, 6, dtype=torch.int64), "pooled": torch.zeros(2, 40)}
    given |= {"noisy": torch.zeros(2, 4, 32, 24), "timesteps": torch.zeros(2), "prompt_embeds": torch.zeros(2, 77, 64)}
    with memory.Live([*real.parameters(), *given.values()]) as live:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            prediction = real(**given)
        loss = prediction.float().square().mean()
        del prediction
        loss.backward()
    here = sum(t.numel() * t.element_size() for t in given.values())
    assert 0.99 * live.peak <= found <= 1.01 * (live.peak + here)


def test_parts_follow_from_sizes(config: Callable[..., Any]) -> None:
    chosen = config(ema={"enabled": True})
    sdxl, groups = skeleton(chosen)
    setting = memory.Step((2, 8, 8), "fp32", "cpu")
    size = sum(p.numel() for p in sdxl.parameters())
    parts = memory.parts(chosen, sdxl, groups, setting)
    fixed = {"weights": 4 * size, "gradients": 4 * size, "optimizer": 8 * size, "averages (EMA)": 4 * size}
    assert {name: parts[name] for name in fixed} == fixed
    larger = memory.parts(chosen, sdxl, groups, memory.Step((6, 8, 8), "fp32", "cpu"))
    assert larger["activations and workspace"] > 2 * parts["activations and workspace"]
    again = config(ema={"enabled": True}, train={"gradient_checkpointing": True})
    less = memory.parts(again, sdxl, groups, memory.Step((6, 8, 8), "fp32", "cpu"))
    assert less["activations and workspace"] < 0.8 * larger["activations and workspace"]
    assert all(p.is_meta for p in sdxl.parameters())  # the model is as it was


def test_narrow_weights_are_kept_beside_averages_that_are_judged(config: Callable[..., Any]) -> None:
    """Where the backward pass leaves no gradients, their copy is what takes most."""
    more = {"train": {"weights": "bf16", "fused_backward": True, "gradient_checkpointing": True}}
    plain, judged = (
        config(**more, optimizer={"name": "adamw_bf16"}, ema={"enabled": True}, validation=asked)
        for asked in ({}, {"prompts": ["a"]})
    )
    sdxl, groups = skeleton(plain)
    without, beside = (
        memory.parts(chosen, sdxl, groups, memory.Step((1, 2, 2), "bf16", "cuda")) for chosen in (plain, judged)
    )
    copy = 2 * sum(group.size for group in groups)
    assert beside["activations and workspace"] == max(copy, without["activations and workspace"])
    assert copy > without["activations and workspace"]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "lokr, whole", "oft", "boft"])
def test_every_adapter_can_be_counted(config: Callable[..., Any], kind: str) -> None:
    more: dict[str, Any] = {"dropout": 0.1} if kind in {"lora", "dora"} else {}
    if kind == "lokr, whole":
        kind, more = "lokr", {"factor": 2, "rank": 10_000, "targets": "linear"}
    chosen = config(adapter={"kind": kind, **more}, train={"gradient_checkpointing": True})
    sdxl, groups = skeleton(chosen)
    found = memory.parts(chosen, sdxl, groups, memory.Step((2, 8, 8), "fp32", "cpu"))
    assert found["gradients"] == 4 * sum(group.size for group in groups) > 0
    assert found["activations and workspace"] > 0
    if "factor" in more:  # a fourth of each matrix, and 2 x 2 numbers
        linear = [m for m in sdxl.unet.modules() if isinstance(m, torch.nn.Linear)]
        assert sum(group.size for group in groups) == sum(m.weight.numel() // 4 + 4 for m in linear)


def test_gradients_lie_beside_the_next_micro_batch(config: Callable[..., Any]) -> None:
    chosen = config()
    sdxl, groups = skeleton(chosen)
    one, two = (
        sum(memory.parts(chosen, sdxl, groups, memory.Step((8, 8, 8), "fp32", "cpu", micro_batches=n)).values())
        for n in (1, 2)
    )
    assert 0 < two - one <= 4 * sum(p.numel() for p in sdxl.parameters()) * 1.1


def test_gradients_that_are_freed_are_not_counted(config: Callable[..., Any]) -> None:
    setting = memory.Step((2, 8, 8), "fp32", "cpu")
    kept, freed = (config(train={"fused_backward": on, "gradient_checkpointing": True}) for on in (False, True))
    sdxl, groups = skeleton(kept)
    size = 4 * sum(p.numel() for p in sdxl.parameters())
    saved = sum(memory.parts(kept, sdxl, groups, setting).values()) - sum(
        memory.parts(freed, sdxl, groups, setting).values()
    )
    assert 0.8 * size < saved <= size


# GB: what `nvidia-smi` calls 16 and 8 GB, less what the driver keeps.
@pytest.mark.parametrize(
    ("precision", "weights", "room", "share"), [("fp16", "fp32", 15.6, 0.75), ("bf16", "bf16", 7.5, 1.0)]
)
def test_a_full_fine_tuning_at_1024_is_planned_to_fit(
    config: Callable[..., Any], precision: str, weights: str, room: float, share: float
) -> None:
    """On a T4, which knows neither bf16 nor flash attention, and on 8 GB: full-size SDXL, all of the UNet."""
    train: dict[str, Any] = {"batch_size": 1, "weights": weights, "memory": f"{room}GB"}
    chosen = config(train=train, optimizer={"name": "adafactor"})
    with torch.device("meta"):
        sdxl = model.SDXL(unets.UNet(blueprint.configs(blueprint.SIZES["sdxl"])["unet"]))
    groups, told = groups_of(chosen, sdxl), list[str]()
    setting = memory.Step((1, 128, 128), precision, "cuda")
    found = memory.fit(chosen, sdxl, groups, setting, told.append)
    assert (found.train.gradient_checkpointing, found.train.fused_backward) == (share, True)
    assert "two passes for each step" in told[0]
    with pytest.raises(UserError, match="the smallest step takes"):  # several processes cannot
        memory.fit(chosen, sdxl, groups, setting, told.append, alone=False)


def fitted(config: Any, samples: int) -> tuple[Any, list[str]]:
    told: list[str] = []
    sdxl, groups = skeleton(config)
    return memory.fit(config, sdxl, groups, memory.Step((samples, 16, 16), "fp32", "cpu"), told.append), told


def test_the_fastest_setting_that_fits_is_chosen(config: Callable[..., Any]) -> None:
    """Whole batches where there is room, then fewer pictures per pass, then gradient checkpointing; nothing else."""
    found = []
    for room in ("2GB", "85MB", "70MB"):
        chosen, told = fitted(config(train={"batch_size": 8, "memory": room}), 8)
        found.append((chosen.train.micro_batch, chosen.train.gradient_checkpointing))
        assert len(told) == 1
        assert told[0].startswith(f"memory {room}: ")
        sdxl, groups = skeleton(chosen)
        passes = memory.Step((chosen.train.micro_batch, 16, 16), "fp32", "cpu", micro_batches=2)
        assert sum(memory.parts(chosen, sdxl, groups, passes).values()) <= 1.01 * memory.bytes_of(room)
    assert found[0] == (8, False)
    assert 1 <= found[1][0] < 8
    assert not found[1][1]
    assert found[2][1]


def test_a_preset_does_not_bind_the_plan_and_the_file_does(tree: Callable[..., Any]) -> None:
    """lora-style says one picture per pass and checkpointing, for those who do not say how much memory there is."""
    under = {"preset": "lora-style@1", "train": {"batch_size": 4, "steps": 1}, "data": [{"resolution": 64}]}
    plain = configfile.validated(tree(**under), "test.toml")
    assert (plain.train.micro_batch, plain.train.gradient_checkpointing) == (1, True)
    roomy = {**under, "train": {**under["train"], "memory": "8GB"}}
    free, _ = fitted(configfile.validated(tree(**roomy), "test.toml"), 4)
    assert (free.train.micro_batch, free.train.gradient_checkpointing) == (4, False)
    roomy["train"] |= {"micro_batch": 2, "gradient_checkpointing": 0.5}
    bound = configfile.validated(tree(**roomy), "test.toml")
    assert (bound.train.micro_batch, bound.train.gradient_checkpointing) == (2, 0.5)
    assert fitted(bound, 2)[0].train.gradient_checkpointing == 0.5


def automatic(config: Any, free: float, before: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    told: list[str] = []
    sdxl, groups = skeleton(config)
    setting = memory.Step((config.train.micro_batch or 8, 16, 16), "fp32", "cpu")
    return memory.fit(config, sdxl, groups, setting, told.append, True, free, before), told


def test_auto_plans_with_a_share_of_what_is_free(config: Callable[..., Any]) -> None:
    asked = {"batch_size": 8, "memory": "auto"}
    found, told = automatic(config(train=asked), 85e6 / memory.SHARE)
    by_hand, _ = fitted(config(train={"batch_size": 8, "memory": "85MB"}), 8)
    assert found.train.model_copy(update={"memory": "85MB"}) == by_hand.train
    assert found.train.micro_batch < 8
    assert told[0].startswith("memory 0.09 GB of 0.09 GB that are free: ")
    with pytest.raises(UserError, match="the smallest step takes") as refused:
        automatic(config(train=asked), 5e6)
    assert refused.value.where == "train.memory = 0.00 GB of 0.01 GB that are free"


def test_auto_keeps_what_the_run_began_with_where_it_still_fits(config: Callable[..., Any]) -> None:
    """Other passes add up in another order: a run that goes on beside less free memory is the same, bit by bit."""
    asked, small = {"batch_size": 8, "memory": "auto"}, 85e6 / memory.SHARE
    first = automatic(config(train=asked), small)[0].train
    before = {name: getattr(first, name) for name in presets.PLANNED}
    again, told = automatic(config(train=asked), 2e9, before)
    assert again.train == first
    assert told[0].endswith(", as before")
    assert automatic(config(train=asked), 2e9)[0].train.micro_batch == 8
    assert automatic(config(train=asked), 70e6 / memory.SHARE, before)[0].train != first, "it does not fit any more"
    limited = automatic(config(train={**asked, "micro_batch": 1}), 2e9, before)[0].train
    assert limited.micro_batch == 1, "what the file says is a limit"


def test_a_run_tells_what_it_chose_of_the_free_memory_and_continues_so(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sdxl_trainer.distributed.free_memory", lambda: 4e9)
    output = train(config(train={"memory": "auto", "steps": 2}))
    assert "memory 3.60 GB of 4.00 GB that are free: 2 per pass, " in capsys.readouterr().err
    monkeypatch.setattr("sdxl_trainer.distributed.free_memory", lambda: 3e9)
    train(config(train={"memory": "auto", "steps": 4}))
    assert "memory 2.70 GB of 3.00 GB that are free: 2 per pass, as before" in capsys.readouterr().err
    assert 'memory = "auto"' in (output / "config.toml").read_text()


@pytest.mark.parametrize("share", [False, 0.25, 0.5, 0.75, True])
def test_no_more_blocks_are_computed_again_than_needed(config: Callable[..., Any], share: float) -> None:
    """Room for exactly what a share takes, at a size where each takes less than the one before."""
    chosen = config(train={"gradient_checkpointing": share})
    sdxl, groups = skeleton(chosen)
    one = memory.Step((1, 64, 64), "fp32", "cpu")
    room = f"{sum(memory.parts(chosen, sdxl, groups, one).values()) / 1e6 + 0.001:.3f}MB"
    told: list[str] = []
    found = memory.fit(config(train={"memory": room}), sdxl, groups, one, told.append)
    assert found.train.gradient_checkpointing == share
    assert found.train.fused_backward is False
    assert ("of the blocks" in told[0]) == (0 < share < 1)


def test_the_library_s_unet_computes_all_of_its_blocks_again_or_none(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    chosen = config(model={"attention": "xformers"}, train={"memory": "5MB"})
    base = bases.resolve(chosen.model, tmp_path)
    model.load(chosen.model, base, None, torch.float32, True, False)
    with pytest.raises(UserError, match="all of its blocks or none"):
        model.load(chosen.model, base, None, torch.float32, 0.5, False)


def test_passes_fit_whose_first_samples_take_less_than_the_optimizer_s_step(config: Callable[..., Any]) -> None:
    """There the second sample takes nothing more, and tells nothing of the later ones."""
    options: dict[str, Any] = {"batch_size": 12, "weights": "bf16"}
    plain = config(train=options, optimizer={"name": "adamw_bf16"})
    sdxl, groups = skeleton(plain)

    def takes(samples: int) -> float:
        passes = memory.Step((samples, 16, 16), "fp32", "cpu", micro_batches=-(-12 // samples))
        return sum(memory.parts(plain, sdxl, groups, passes).values())

    assert takes(1) == takes(2) < takes(11)
    for room in (takes(1), (takes(1) + takes(11)) / 2):
        chosen = config(train={**options, "memory": f"{room / 1e6 + 0.001:.3f}MB"}, optimizer={"name": "adamw_bf16"})
        found = memory.fit(chosen, sdxl, groups, memory.Step((12, 16, 16), "fp32", "cpu"), lambda _: None)
        samples = found.train.micro_batch
        assert samples is not None
        assert not found.train.gradient_checkpointing
        assert takes(samples) <= room + 1000 < takes(samples + 1)


def test_what_cannot_fit_is_told_with_what_would(config: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="the smallest step takes") as refused:
        fitted(config(train={"memory": "5MB"}), 2)
    assert all(option in refused.value.fix for option in ("adamw8bit", "adamw_bf16", "adafactor"))


def test_a_run_within_memory_takes_the_steps_of_one_without(config: Callable[..., Any], tmp_path: Path) -> None:
    losses = []
    for number, room in enumerate((None, "70MB")):
        output = train(
            config(output_dir=str(tmp_path / str(number)), train={"steps": 2, "batch_size": 4, "memory": room})
        )
        losses.append([row["loss"] for row in read_metrics(output / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "micro_batch = " in (tmp_path / "1" / "config.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("text", "size"), [("12GB", 12e9), ("7.5 GiB", 7.5 * 2**30), ("800MB", 8e8)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert memory.bytes_of(text) == size


@pytest.mark.parametrize("text", ["12", "GB", "12 gigabytes", "-1GB"])
def test_other_sizes_are_refused(config: Callable[..., Any], text: str) -> None:
    with pytest.raises(UserError, match="memory"):
        config(train={"memory": text})


def test_check_tells_it(config: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    from sdxl_trainer import check

    check.run(config())
    printed = capsys.readouterr().out
    assert "activations and workspace" in printed
    assert "together" in printed
    assert "not counted                Python with its libraries" in printed, "a CPU's memory holds them too"
