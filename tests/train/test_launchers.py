"""What `accelerate config` can ask for: each setting, through accelerate's own launcher, is honoured or refused."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from accelerate.utils import launch as environments

from sdxl_trainer import distributed
from sdxl_trainer.errors import UserError
from sdxl_trainer.sharding import UNITS, Sharding

# What `accelerate config` writes for one machine with two GPUs.
PLAIN = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "machine_rank": 0, "num_machines": 1,
    "num_processes": 2, "mixed_precision": "no", "downcast_bf16": "no", "gpu_ids": "all", "rdzv_backend": "static",
    "main_training_function": "main", "same_network": True, "use_cpu": False, "debug": False,
}  # fmt: skip
FSDP = {
    "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False, "fsdp_activation_checkpointing": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True,
}  # fmt: skip


def fsdp(**settings: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "fsdp_config": {**FSDP, **settings}}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What the launcher asks for is read once by each process."""
    distributed._launcher_shards.cache_clear()
    yield
    distributed._launcher_shards.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Sets the environment in which `accelerate launch --config_file` would start a script."""

    def start(settings: dict[str, Any]) -> dict[str, str]:
        path = tmp_path / "accelerate.json"
        path.write_text(json.dumps({**PLAIN, **settings}), encoding="utf-8")
        given = launch.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        args, _, _ = launch._validate_launch_command(given)
        before = dict(os.environ)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ""
            made = environments.prepare_deepspeed_cmd_env(args)[1]
        elif args.num_processes == 1 or args.use_cpu:
            made = environments.prepare_simple_launcher_cmd_env(args)[1]
        else:
            made = environments.prepare_multi_gpu_env(args)
        asked = {name: value for name, value in made.items() if before.get(name) != value}
        for name, value in asked.items():
            monkeypatch.setenv(name, value)
        return asked

    return start


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "torch.compile"),
    ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "DeepSpeed"),
    ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}, "DeepSpeed"),
    ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}}, "Megatron-LM"),
    ({**fsdp(), "parallelism_config": {"parallelism_config_tp_size": 2}}, "tensor or context parallelism"),
    (fsdp(fsdp_version=1), "first version of FSDP"),
    (fsdp(fsdp_offload_params=True), "fsdp_offload_params"),
    (fsdp(fsdp_activation_checkpointing=True), "fsdp_activation_checkpointing"),
    (fsdp(fsdp_activation_checkpointing_offload=True), "fsdp_activation_checkpointing_offload"),
    (fsdp(fsdp_ignored_modules="unet.conv_in"), "fsdp_ignored_modules"),
]


def asked(config: Any, said: list[str]) -> tuple[str, Sharding | None]:
    distributed.refuse_engines()
    return distributed.precision("auto", said.append), distributed.sharding(config, said.append)


@pytest.mark.parametrize(("settings", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_settings_that_are_refused(
    config: Callable[..., Any], launched: Callable[..., Any], settings: dict[str, Any], says: str
) -> None:
    launched(settings)
    with pytest.raises(UserError, match=says) as caught:
        asked(config(), [])
    assert caught.value.where == "accelerate config"
    assert caught.value.fix


HONOURED: list[tuple[dict[str, Any], str, Sharding | None]] = [
    ({}, "fp32", None),
    ({"mixed_precision": "bf16"}, "bf16", None),
    ({"mixed_precision": "fp16"}, "fp16", None),
    ({"use_cpu": True, "distributed_type": "NO"}, "fp32", None),
    (fsdp(), "fp32", Sharding()),
    (fsdp(fsdp_reshard_after_forward=False), "fp32", Sharding(reshard=False)),
    (fsdp(fsdp_transformer_layer_cls_to_wrap="ResnetBlock2D"), "fp32", Sharding(("ResnetBlock2D",))),
    (fsdp(fsdp_auto_wrap_policy="NO_WRAP"), "fp32", Sharding(())),
    (fsdp(fsdp_auto_wrap_policy="SIZE_BASED_WRAP", fsdp_min_num_params=5000), "fp32", Sharding((), 5000)),
    ({**fsdp(), "mixed_precision": "bf16"}, "bf16", Sharding(UNITS)),
]


@pytest.mark.parametrize(("settings", "precision", "sharding"), HONOURED, ids=str)
def test_settings_that_are_honoured(
    config: Callable[..., Any],
    launched: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    precision: str,
    sharding: Sharding | None,
) -> None:
    launched(settings)
    if not settings.get("use_cpu"):
        monkeypatch.setattr(distributed, "device_type", lambda: "xpu")  # any that computes in all types
    said: list[str] = []
    assert asked(config(), said) == (precision, sharding)
    without = ["fsdp_state_dict_type", "fsdp_cpu_ram_efficient_loading"]
    assert all(name in said[0] for name in without) if sharding else not said


def test_every_setting_of_fsdp_that_the_launcher_passes_on_is_known(launched: Callable[..., Any]) -> None:
    names = {name for name in launched(fsdp(fsdp_ignored_modules="x")) if name.startswith("FSDP_")}
    honoured = {"VERSION", "AUTO_WRAP_POLICY", "TRANSFORMER_CLS_TO_WRAP", "MIN_NUM_PARAMS", "RESHARD_AFTER_FORWARD"}
    assert names <= {*distributed._REFUSED, *distributed._IDLE, *(f"FSDP_{name}" for name in honoured)}


def test_the_config_goes_before_the_launcher_and_says_so(
    launched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched({"mixed_precision": "fp16"})
    monkeypatch.setattr(distributed, "device_type", lambda: "xpu")
    said: list[str] = []
    assert distributed.precision("bf16", said.append) == "bf16"
    assert said == ["the config asks for bf16: the launcher's mixed precision 'fp16' has no effect"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision 'fp8'"),
        ("XLA_USE_BF16", "1", "TPUs"),
        ("XLA_DOWNCAST_BF16", "1", "TPUs"),
        ("ACCELERATE_USE_IPEX", "true", "ipex"),
        ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "MODEL_PARALLEL", "SageMaker"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient accumulation"),
    ],
)
def test_what_launchers_pass_on_elsewhere(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.make(config(), distributed.precision("auto", print))
