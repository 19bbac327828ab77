"""Where a run computes: device, precision, processes, as accelerate finds them; the only reader of the environment."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_LAUNCHER_NAMES = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}


def device_type() -> str:
    """Kind of device that accelerate will choose."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in {"1", "true", "yes"}:
        return "cpu"
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None else "cpu"


def precision(wanted: str, say: Callable[[str], None]) -> str:
    """The compute type that can be had: fp32, fp16 or bf16."""
    device = device_type()
    if wanted == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if launcher and launcher not in _LAUNCHER_NAMES:
            fix = "choose no, fp16 or bf16 in accelerate config, or set train.precision"
            raise UserError(f"the launcher asks for mixed precision '{launcher}'", "accelerate config", fix)
        if launcher in _LAUNCHER_NAMES:
            wanted = _LAUNCHER_NAMES[launcher]
        elif device == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        else:
            return "fp32"
    if wanted != "fp32" and device == "cpu":
        nearest = "bf16" if _cpu_has_bf16() else "fp32"
        if nearest != wanted:
            say(f"this CPU cannot compute in {wanted}; computing in {nearest}, the nearest it can do")
        return nearest
    if wanted == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        say("this GPU has no bf16; computing in fp16")
        return "fp16"
    return wanted


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def leads() -> bool:
    """Whether this is the first of a run's processes, by what launchers set; known before they have met."""
    return int(os.environ.get("RANK", "0")) == 0


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
    """Memory that the run takes, in GB: the most so far on a GPU, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def make(config: Config, computing: str) -> "Accelerator":
    """accelerate's handle on devices and processes. Micro-batches are our own, so it accumulates nothing."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    accumulate = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulate != "1":
        what = f"the launcher asks for {accumulate} gradient accumulation steps"
        raise UserError(what, "accelerate config", "set train.batch_size and train.micro_batch instead")
    if config.train.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    # bf16 weights compute in bf16 by themselves; autocast is for fp32 weights.
    autocast = "no" if computing == "fp32" or config.train.weights == "bf16" else computing
    output = Path(config.output_dir).expanduser()
    # One process may make several runs, each with its own precision; accelerate would keep the first one's.
    AcceleratorState._reset_state()
    return Accelerator(
        # Without a word accelerate takes several processes without an accelerator for as many runs.
        cpu=device_type() == "cpu",
        mixed_precision=autocast,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / config.log.dir)),
    )
