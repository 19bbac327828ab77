"""A GPU that is made up, for machines without one: tensors that say they are on `cuda:0`, lie in host memory, and are
computed by the CPU.

It is as strict as CUDA about what can be seen from Python. Tensors of both sides do not mix; a generator belongs to a
side; and whatever makes the host wait for the device is noted in `waits`: a value that is read, a copy to the host, a
copy from memory that is not pinned, an operation whose result has a size of its own. It does not have CUDA's kernels,
streams and memory, and of several devices it has one. `a_gpu` is the machine's own where it has one.
"""

import linecache
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent
aten = torch.ops.aten
# Operations that wait for their result, or for its size.
WAITING = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.unique_dim_consecutive, aten.is_nonzero, aten._linalg_check_errors,
}  # fmt: skip
# Optimizers' kernels that read weights, gradients and state by one number: their layouts have to be the same.
FUSED = {aten._fused_adamw_, aten._fused_adam_, aten._fused_sgd_}
# What autocast does in fp32 on CUDA, and not on a CPU.
WIDE = {"layer_norm", "group_norm"}
# What makes tensors, out of nothing or of numbers of the host.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray}


class OnGpu(Tensor):
    """`host` is the same memory as a plain tensor."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnGpu":
        made = Tensor._make_subclass(cls, host.detach())
        made.host = host.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, *_: Any) -> str:
        return f"{self.host!r} on {DEVICE}"

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo: Any) -> "OnGpu":
        made = OnGpu(self.host.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor | torch.Generator)]
        _refuse_mixed(function, args, leaves)
        if function.overloadpacket in WAITING:
            wait(str(function))
        if function.overloadpacket in {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}:
            if any(i is not None and (i.dtype in {torch.bool, torch.uint8} or not on_gpu(i)) for i in args[1]):
                wait(f"{function} by a mask, or by indices of the host")
        if function.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is None:
            wait(f"{function} without output_size")
        if function.overloadpacket in FUSED:
            _refuse_other_layouts(function, args)
        own = {id(leaf.host): leaf for leaf in leaves if on_gpu(leaf)}
        plain = tree_map_only(OnGpu, lambda t: t.host, (args, kwargs))
        found = function(*plain[0], **plain[1])
        if function.overloadpacket is aten.copy_ and not on_gpu(args[0]):
            return args[0]
        return tree_map_only(Tensor, lambda t: own.get(id(t)) if id(t) in own else OnGpu(t), found)


def on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, OnGpu)


def _refuse_mixed(function: Any, args: Any, leaves: list[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != "cuda":
            raise RuntimeError(f"{function}: expected a 'cuda' generator, found 'cpu'")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if function.overloadpacket is aten.copy_:
        if on_gpu(args[0]) != on_gpu(args[1]):
            _copied(args[0], args[1], len(args) > 2 and args[2])
        return
    if function.overloadpacket in {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}:
        tensors = [args[0], *args[2:3]]
    beside = [t for t in tensors if not on_gpu(t)]
    # A single number of the host becomes an argument of the kernel; lists of tensors are not that kind.
    if any(t.dim() or "foreach" in str(function) for t in beside):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")


def _refuse_other_layouts(function: Any, args: Any) -> None:
    lists = [given for given in args if isinstance(given, list) and given and given[0].dim()]
    for alike in zip(*lists, strict=True):
        layouts = {
            (tuple(step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1), t.dtype) for t in alike
        }
        if len(layouts) > 1:
            raise RuntimeError(f"{function}: params, grads and state must have same dtype and layout, found {layouts}")


def _copied(target: Any, source: Any, non_blocking: bool) -> None:
    """Note a copy between the sides, if the host waits for it."""
    host = source if on_gpu(target) else target
    if not (non_blocking and getattr(host, "is_made_up_pinned", False)):
        wait(f"a copy {'from' if on_gpu(target) else 'to'} the host{'' if non_blocking else ', blocking'}")


waits: list[str] = []


def wait(what: str) -> None:
    """Note that the host waits: for what, at which of this repository's lines, and by which of a library's."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)]
    frames = [place for place in frames if place[0] not in {__file__, warnings.__file__}]
    ours = [place for place in frames if place[0].startswith(str(ROOT)) and "site-packages" not in place[0]]
    places = dict.fromkeys([*ours[:1], frames[0]])
    waits.append(f"{what}: " + " > ".join(f"{Path(f).name}:{n} {linecache.getline(f, n).strip()}" for f, n in places))


class Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.side = torch.device(device).type
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    device = property(lambda self: DEVICE if self.side == "cuda" else torch.device("cpu"))  # type: ignore[assignment]


class Host(TorchFunctionMode):
    """What the host asks for by naming a device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, Tensor) and name in {"to", "cpu", "cuda", "tolist", "numpy", "__array__", "pin_memory"}:
            return self._moved(function, name, first, args, kwargs)
        if name in WIDE and on_gpu(first) and torch.is_autocast_enabled("cpu"):
            wide = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return function(*wide[0], **wide[1])
        if kwargs.pop("pin_memory", False):
            return pinned(function(*args, **kwargs))
        given = kwargs.get("device")
        if given is None and function in _device_constructors():
            given = kwargs["device"] = torch.utils._device.CURRENT_DEVICE  # `with torch.device(...)`
        if given is None or isinstance(first, Tensor):  # like another tensor, which knows where it is
            if given is not None and on_gpu(first) != (torch.device(given).type == "cuda"):
                raise RuntimeError(f"{function} across sides")
            if on_gpu(first):
                kwargs.pop("device", None)
            return function(*args, **kwargs)
        if torch.device(given).type != "cuda":
            return function(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            raise RuntimeError(f"{name}: expected a 'cuda' generator, found 'cpu'")
        if function in FROM_HOST:
            wait(f"torch.{name} of numbers of the host")
        made = function(
            *args,
            **{**kwargs, "device": "cpu", "requires_grad": False}
            if "requires_grad" in kwargs
            else {**kwargs, "device": "cpu"},
        )
        made = made if on_gpu(made) else OnGpu(made)
        return made.requires_grad_(bool(kwargs.get("requires_grad")))

    def _moved(self, function: Any, name: str, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "pin_memory":
            return pinned(tensor.clone())
        if name in {"tolist", "numpy", "__array__"}:
            if not on_gpu(tensor):
                return function(*args, **kwargs)
            if name != "tolist":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            wait("tolist")
            return tensor.detach().host.tolist()
        device, dtype, non_blocking = _where(name, args[1:], kwargs)
        if device is not None and device.type == "meta":
            return torch.empty_like(tensor, dtype=dtype, device=device)
        there = (
            tensor if device is None or (device.type == "cuda") == on_gpu(tensor) else _crossed(tensor, non_blocking)
        )
        if (dtype is None or dtype == there.dtype) and not kwargs.get("copy"):
            return there
        return Tensor.to(there, dtype or there.dtype, copy=bool(kwargs.get("copy")))


def _where(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, bool]:
    """Device, type and whether not to wait, as `Tensor.to` and its kin are told."""
    if name in {"cpu", "cuda"}:
        return torch.device(name), None, bool(kwargs.get("non_blocking"))
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    args = tuple(
        DEVICE
        if isinstance(a, str | torch.device | int) and not isinstance(a, bool) and str(a).startswith("cuda")
        else a
        for a in args
    )
    kwargs = {k: DEVICE if k == "device" and str(v).startswith("cuda") else v for k, v in kwargs.items() if k != "copy"}
    return torch._C._nn._parse_to(*args, **kwargs)[:3]


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.host.clone() if on_gpu(tensor) else OnGpu(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.host.clone() if on_gpu(gradient) else OnGpu(gradient.clone())


def _crossed(tensor: Tensor, non_blocking: bool) -> Tensor:
    if tensor.is_meta:
        raise RuntimeError("Cannot copy out of meta tensor; no data!")
    if not (non_blocking and getattr(tensor, "is_made_up_pinned", False)):
        which = "to" if on_gpu(tensor) else "from"
        wait(f"a copy {which} the host, {'not pinned' if non_blocking else 'blocking'}")
    return _Cross.apply(tensor)


def pinned(tensor: Tensor) -> Tensor:
    tensor.is_made_up_pinned = True  # type: ignore[attr-defined]
    return tensor


class Autocast(torch.amp.autocast_mode.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _grouped(lists: Any, with_indices: bool = False) -> Any:
    """As PyTorch groups tensors for its kernels over many: by device and type of the first list's."""
    found: dict[Any, Any] = {}
    for number, first in enumerate(lists[0]):
        key = (first.device, first.dtype)
        own, indices = found.setdefault(key, ([[] for _ in lists], []))
        for into, tensors in zip(own, lists, strict=True):
            if tensors:
                into.append(tensors[number])
        indices.append(number)
    return found


class Properties:
    name, total_memory, major, minor, multi_processor_count = "a GPU that is made up", 80 << 30, 9, 0, 132


# Of torch.cuda.
CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: Properties.name,
    "get_device_properties": lambda device=None: Properties,
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "is_initialized": lambda: True,
    "manual_seed_all": lambda seed: None,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: wait("synchronize"),
}


class Stream:
    @staticmethod
    def is_capturing() -> bool:
        return False


@contextmanager
def made_up_gpu() -> Iterator[list[str]]:
    """While it lasts PyTorch has the GPU; gives the list of what the host waited for."""
    waits.clear()
    with suppress(ImportError):
        import bitsandbytes  # noqa: F401 - it looks for kernels of its own where there is a GPU
    import torch.optim.optimizer as optimizers
    from accelerate.state import AcceleratorState

    mode, backward = Host(), torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:  # it computes forward again where activations were not kept
            return backward(*args, **kwargs)

    known = [*optimizers._foreach_supported_types, OnGpu]
    with (
        patch.multiple(torch.cuda, **CUDA),
        patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
        patch.object(torch.accelerator, "current_stream", lambda device=None: Stream),
        patch.object(torch, "Generator", Generator),
        patch.object(Tensor, "pin_memory", lambda tensor, *_: pinned(tensor.clone())),
        patch.object(torch, "autocast", Autocast),
        patch.object(torch.amp, "autocast", Autocast),
        patch.object(torch.amp.autocast_mode, "autocast", Autocast),
        patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped),
        patch.object(torch.autograd, "_engine_run_backward", run_backward),
        patch.object(optimizers, "_foreach_supported_types", known),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with mode:
                yield waits
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.__future__.set_overwrite_module_params_on_conversion(before)


@contextmanager
def real_gpu() -> Iterator[list[str]]:
    """The machine's own; gives the list of what the host waited for, as far as PyTorch tells."""
    from accelerate.state import AcceleratorState

    def told(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            wait("the device")

    waits.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            warnings.showwarning = told
            torch.cuda.set_sync_debug_mode("warn")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
        AcceleratorState._reset_state(reset_partial_state=True)


REAL = torch.cuda.is_available()
a_gpu = real_gpu if REAL else made_up_gpu
