"""Where a run computes: device, precision, processes, as accelerate finds them; the only reader of the environment."""

import json
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch
from torch import Tensor

from sdxl_trainer import cpus
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError
from sdxl_trainer.model import SDXL
from sdxl_trainer.sharding import UNITS, Sharding, shard

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_LAUNCHER_NAMES = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
# Settings of launchers that ask for another engine, and what to do instead.
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "choose FSDP with fsdp_version 2, which shards the same (ZeRO-3)"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "choose multi-GPU or FSDP with fsdp_version 2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("tensor or context parallelism", "choose FSDP with fsdp_version 2"),
    "ACCELERATE_USE_IPEX": ("Intel's extension (ipex)", "answer no to it: PyTorch has its kernels"),
    "XLA_USE_BF16": ("TPUs", "use GPUs or the CPU"),
    "XLA_DOWNCAST_BF16": ("TPUs", "use GPUs or the CPU"),
}
# Settings of FSDP that are refused, and what to do instead.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "use more processes, or optimizer.name = 'adafactor' without FSDP",
    "FSDP_ACTIVATION_CHECKPOINTING": "set train.gradient_checkpointing = true, which does the same",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "set train.gradient_checkpointing = true",
    "FSDP_IGNORED_MODULES": "remove fsdp_ignored_modules: everything is sharded",
}
# Settings of FSDP that change nothing here: of version 1, or about files, which are always whole.
_IDLE = (
    "FSDP_BACKWARD_PREFETCH",
    "FSDP_FORWARD_PREFETCH",
    "FSDP_USE_ORIG_PARAMS",
    "FSDP_SYNC_MODULE_STATES",
    "FSDP_SHARDING_STRATEGY",
    "FSDP_STATE_DICT_TYPE",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
)
# How long processes wait for another that reads data or encodes its share; in the loop `train.hang_timeout` counts.
_PATIENCE = timedelta(hours=12)


def device_type() -> str:
    """Kind of device that accelerate will choose."""
    if _on(os.environ.get("ACCELERATE_USE_CPU", "false")):
        return "cpu"
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else "cpu"


def precision(wanted: str, say: Callable[[str], None]) -> str:
    """The compute type that can be had: fp32, fp16 or bf16."""
    device = device_type()
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if wanted == "auto":
        if launcher and launcher not in _LAUNCHER_NAMES:
            fix = "choose no, fp16 or bf16 in accelerate config, or set train.precision"
            raise UserError(f"the launcher asks for mixed precision '{launcher}'", "accelerate config", fix)
        if launcher in _LAUNCHER_NAMES:
            wanted = _LAUNCHER_NAMES[launcher]
        elif device == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            return "fp32"
    elif launcher not in {None, "no"} and _LAUNCHER_NAMES.get(launcher) != wanted:
        say(f"the config asks for {wanted}: the launcher's mixed precision '{launcher}' has no effect")
    if wanted != "fp32" and device == "cpu":
        nearest = "bf16" if _cpu_has_bf16() else "fp32"
        if nearest != wanted:
            say(f"this CPU cannot compute in {wanted}; computing in {nearest}, the nearest it can do")
        return nearest
    if wanted == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        say("this GPU has no bf16; computing in fp16")
        return "fp16"
    return wanted


def one_pass(config: Config, processes: int, sizes: int) -> bool:
    """Whether each step may be one pass of one process, of pictures that have `sizes` sizes: the last steps of an epoch
    mix them, and take a pass for each. UserError where they have to be and cannot."""
    mixed = sizes > 1 and config.train.batch_size > 1
    if processes > 1 and config.train.fused_backward:
        what = f"train.fused_backward on {processes} processes, which average their gradients"
        raise UserError(what, "train.fused_backward", "set train.shard = true in its place: each keeps a part of them")
    if mixed and config.train.fused_backward:
        what = (
            f"train.fused_backward with pictures of {sizes} sizes, of which some steps have several: gradients add up"
        )
        fix = 'set buckets = "none" for the data, or train.batch_size = 1; or remove train.fused_backward'
        raise UserError(what, "train.fused_backward", fix)
    return processes == 1 and not mixed


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def leads() -> bool:
    """Whether this is the first of a run's processes, by what launchers set; known before they have met."""
    return int(os.environ.get("RANK", "0")) == 0


def turns(accelerator: "Accelerator", count: int) -> Iterator[tuple[int, bool]]:
    """This process's share of `count` things: (which, whether it counts). All processes take equally many turns, since
    they may have to meet in each; where one has fewer, it does another's once more, not to be counted."""
    for start in range(0, count, accelerator.num_processes):
        index = start + accelerator.process_index
        yield min(index, count - 1), index < count


def decided(accelerator: "Accelerator", decide: Callable[[], T]) -> T:
    """What the main process finds, given to all; what is wrong with it ends all, and is told once."""
    if accelerator.num_processes == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = decide()
        except UserError as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1] if accelerator.is_main_process else SystemExit(2)
    return found[0]


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all processes, in the order of these."""
    from accelerate.utils import gather_object

    return gather_object(rows)


def memory_gb(device: torch.device) -> float:
    """Memory that the run takes, in GB: the most so far on a GPU, else what the process holds now, or the most that it
    held where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        pages = int(os.pread(_statm(os.getpid()), 100, 0).split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory() -> float:
    """Bytes that are free where this process will compute: on its GPU, or its share of the host's."""
    kind = device_type()
    if kind == "cuda":
        return float(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return min(psutil.virtual_memory().available, cpus.memory_left()) / beside


@cache
def _statm(process: int) -> int:
    """Kept open: it is read after each step, and to open it takes ten times as long."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY)


@cache
def _launcher_shards() -> bool:
    """Whether the launcher asks for FSDP. accelerate is not to see it: without a GPU it would silently take DDP, and
    transformers would leave the weights of all processes but the first empty."""
    return _on(os.environ.pop("ACCELERATE_USE_FSDP", "false"))


def _on(value: str) -> bool:
    """Whether a switch is on, in any of the words that accelerate takes."""
    return value.lower() in {"1", "true", "t", "yes", "y", "on"}


def sharding(config: Config, say: Callable[[str], None]) -> Sharding | None:
    """How weights are sharded among the processes, if they are to be; what a launcher asks for beyond that is refused
    or said to have no effect."""
    launcher = _launcher_shards()
    if not (launcher or config.train.shard):
        return None
    where, given = "accelerate config", {n: os.environ[n] for n in os.environ if n.startswith("FSDP_") and launcher}
    if launcher and given.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for the first version of FSDP", where, "set fsdp_version: 2")
    for name, instead in _REFUSED.items():
        if _on(given.get(name, "")) or (name == "FSDP_IGNORED_MODULES" and given.get(name)):
            raise UserError(f"{name.lower()} is not supported", where, instead)
    idle = [name.lower() for name in _IDLE if given.get(name)]
    if idle:
        say(f"no effect with FSDP 2 here: {', '.join(idle)}")
    policy = given.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP").upper()
    if policy not in {"TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"}:
        raise UserError(f"there is no wrap policy '{policy}'", where, "TRANSFORMER_BASED_WRAP is for this model")
    classes = tuple(name for name in given.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name)
    units = {"TRANSFORMER_BASED_WRAP": classes or UNITS}.get(policy, ())
    least = int(given.get("FSDP_MIN_NUM_PARAMS", "100000000")) if policy == "SIZE_BASED_WRAP" else None
    return Sharding(units, least, _on(given.get("FSDP_RESHARD_AFTER_FORWARD", "true")))


def refuse_engines() -> None:
    """Refuse what launchers can ask for and this program does not do."""
    for name, (engine, instead) in _ENGINES.items():
        if _on(os.environ.get(name, "false")):
            raise UserError(f"the launcher asks for {engine}, which is not supported", "accelerate config", instead)
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        what = f"the launcher asks for torch.compile ('{compiler}')"
        raise UserError(what, "accelerate config", "answer no to torch dynamo")
    cloud = os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO")
    if cloud != "NO":
        what = f"the launcher asks for SageMaker's own parallelism ('{cloud}')"
        raise UserError(what, "accelerate config", "answer no to it, and start torchrun there")


def wrapped(accelerator: "Accelerator", sdxl: SDXL, sharding: Sharding | None) -> Any:
    """The model on its device, as each process calls it: sharded, or as a replica (DDP). What was wrapped is looked
    at, since launchers and libraries fall back without a word."""
    if accelerator.num_processes == 1:
        # Told to move it, accelerate does not import sharding to see whether it may.
        return accelerator.prepare(sdxl, device_placement=[True])
    if sharding is None:
        model = accelerator.prepare(sdxl)
        if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise RuntimeError(f"{accelerator.num_processes} processes, and the model is a {type(model).__name__}")
        return model
    sdxl.to(accelerator.device)
    shard(sdxl, sharding, accelerator.num_processes, accelerator.device)
    if accelerator.mixed_precision != "no":
        inner = sdxl.forward

        def forward(*tensors: Any, **more: Any) -> Tensor:
            with accelerator.autocast():
                return inner(*tensors, **more).float()

        sdxl.forward = forward  # type: ignore[method-assign]
    return sdxl


def _meet() -> None:
    """Join the other processes of torchrun under keys that no others have used. It keeps one store for all attempts of
    a run, in which the addresses of the attempt before still lie, and counts restarts on each machine by itself
    (pytorch/pytorch issue 135712)."""
    backend = {"cuda": "nccl", "cpu": "gloo"}.get(device_type())
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if backend is None or not shared or torch.distributed.is_initialized():
        return
    store, rank, count = next(torch.distributed.rendezvous("env://", timeout=_PATIENCE))
    fresh = torch.distributed.PrefixStore(_attempt(store, rank, count), store)
    torch.distributed.init_process_group(backend, store=fresh, rank=rank, world_size=count, timeout=_PATIENCE)


def _attempt(store: Any, rank: int, count: int) -> str:
    """A name for this attempt to run together. The first process makes it, and says who is with it; whoever read the
    name of an earlier attempt does not find itself among those, and looks again."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", own)
        others = [store.get(f"{own}/{number}").decode() for number in range(1, count)]
        store.set(f"{own}/all", json.dumps(others))
        return own
    while True:
        name = store.get("attempt").decode()
        store.set(f"{name}/{rank}", own)
        if store.check([f"{name}/all"]) and own in json.loads(store.get(f"{name}/all")):
            return name
        time.sleep(0.05)


def make(config: Config, computing: str) -> "Accelerator":
    """accelerate's handle on devices and processes. Micro-batches are our own, so it accumulates nothing."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        AutocastKwargs,
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    refuse_engines()
    _launcher_shards()
    accumulate = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulate != "1":
        what = f"the launcher asks for {accumulate} gradient accumulation steps"
        raise UserError(what, "accelerate config", "set train.batch_size and train.micro_batch instead")
    if config.train.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    # bf16 weights compute in bf16 by themselves; autocast is for fp32 weights.
    autocast = "no" if computing == "fp32" or config.train.weights == "bf16" else computing
    output = Path(config.output_dir).expanduser()
    handlers = [
        InitProcessGroupKwargs(timeout=_PATIENCE),
        # A pass casts each weight once: to keep what was cast until its end would only take memory.
        AutocastKwargs(cache_enabled=False),
        # Gradients of replicas lie in the buckets that are sent: as tensors of their own they would be there twice.
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    # One process may make several runs, each with its own precision; accelerate would keep the first one's.
    AcceleratorState._reset_state()
    _meet()
    return Accelerator(
        # Without a word accelerate takes several processes without an accelerator for as many runs.
        cpu=device_type() == "cpu",
        mixed_precision=autocast,
        kwargs_handlers=handlers,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / config.log.dir)),
    )
