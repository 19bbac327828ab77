"""How much memory a training step takes: counted, on tensors without values.

The model's forward and backward pass run on fake tensors, of which only sizes exist, and what is alive is counted at
every operation. To that come the weights, the optimizer's state and averages.
"""

import copy
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sdxl_trainer import adapters, guards, kernels, model, narrow, optim
from sdxl_trainer import unet as unets
from sdxl_trainer.config import Config
from sdxl_trainer.config.section import bytes_of
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError
from sdxl_trainer.model import SDXL
from sdxl_trainer.optim import backward
from sdxl_trainer.parameters import Group

# Of the free memory, how much `train.memory = "auto"` plans with: predictions are off by some percent
# (docs/performance.md), and what a device gives and takes leaves gaps.
SHARE = 0.9
# What CUDA with its libraries takes for itself, and oneDNN for the kernels that it compiles.
_LIBRARIES = {"cuda": 0.6e9, "cpu": 40e6}


@dataclass(frozen=True)
class Step:
    """One step's setting: `shape` is (samples, h, w) of a micro-batch's latents, `device` a type of device."""

    shape: tuple[int, int, int]
    precision: str
    device: str
    tokens: int = 77
    micro_batches: int = 1


class Pass(NamedTuple):
    """All that a step's passes through a model depend on; other settings change what lies beside them."""

    setting: Step
    narrow: bool  # weights in bf16
    beside: bool  # an adapter or new words learn, not the weights
    checkpointing: float
    workspace: int | None  # of the optimizer, in bytes, where it steps during the backward pass


Count = Callable[[SDXL, Pass], int]


def step(config: Config, shapes: Iterable[tuple[int, int]], precision: str, device: str) -> Step:
    """The step of a run: micro-batches of the largest of the pictures' shapes."""
    height, width = max(shapes, key=lambda sides: sides[0] * sides[1])
    samples = min(config.train.micro_batch or config.train.batch_size, config.train.batch_size)
    passes = -(-config.train.batch_size // samples)
    return Step((samples, height // 8, width // 8), precision, device, micro_batches=passes)


# Settings that change what is computed, in the order in which they slow training or cost precision.
_FURTHER: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("optimizer.name = adamw8bit", {"optimizer": {"name": "adamw8bit"}}),
    (
        "train.weights = bf16, optimizer.name = adamw_bf16",
        {"train": {"weights": "bf16"}, "optimizer": {"name": "adamw_bf16"}},
    ),
    (
        "train.weights = bf16, optimizer.name = adamw8bit",
        {"train": {"weights": "bf16"}, "optimizer": {"name": "adamw8bit"}},
    ),
    (
        "train.weights = bf16, optimizer.name = adafactor",
        {"train": {"weights": "bf16"}, "optimizer": {"name": "adafactor"}},
    ),
)
# Forward passes that forward and backward together cost; checkpointing runs its share of one once more.
PASSES = 3.0
_SHARES = (0.25, 0.5, 0.75)
_NARROWER = tuple((f"train.frozen = {kind}", {"train": {"frozen": kind}}) for kind in ("fp8", "nf4"))


class Way(NamedTuple):
    """What lowers the memory of a step and changes only its time."""

    share: float  # of the blocks whose activations are computed again
    fused: bool

    @property
    def options(self) -> dict[str, Any]:
        return {"gradient_checkpointing": True if self.share == 1 else self.share, "fused_backward": self.fused}

    def least(self, samples: int) -> int:
        """The fewest samples of a pass: a fused backward pass has all of its step."""
        return samples if self.fused else 1

    def told(self) -> tuple[str, str]:
        """What it is called, and what it costs."""
        words, costs = "", list[str]()
        if self.share:
            words = ", gradient checkpointing" + (f" of {self.share:.0%} of the blocks" if self.share < 1 else "")
            costs.append(f"activations are computed again, about {self.share / PASSES:.0%} more work")
        if self.fused:
            words, costs = f"{words}, fused backward", [*costs, "two passes for each step"]
        return words, "".join(f"; {cost}" for cost in costs)


def fit(
    config: Config,
    sdxl: SDXL,
    groups: list[Group],
    setting: Step,
    say: Callable[[str], None],
    alone: bool = True,
    free: float = 0.0,
    before: dict[str, Any] | None = None,
) -> Config:
    """The config with the fastest micro-batch, checkpointing and, where a pass is `alone` in its step, fused backward
    pass whose step fits into `train.memory`, which may be a share of the `free` bytes: none changes what is learned.
    Those of `before` stay where they fit, since sums in another order round otherwise. UserError tells what the
    smallest takes, and what other settings would."""
    if config.train.memory is None:
        return config
    auto, every = config.train.memory == "auto", setting.shape[0]
    room = SHARE * free if auto else bytes_of(config.train.memory)
    given = f"{room / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free" if auto else config.train.memory
    together = partial(_together, cache(_count), sdxl, groups, setting)  # many settings make the same pass

    @cache
    def takes(way: Way, samples: int) -> float:
        return together(_with(config, train=way.options), samples)

    def smallest(way: Way) -> float:
        return takes(way, way.least(every))

    shares, own = _shares(config, sdxl), config.train.fused_backward
    if auto and before is not None:
        way = Way(float(before["gradient_checkpointing"]), before["fused_backward"])
        samples, may = before["micro_batch"] or every, own or _may_fuse(config, setting, alone)
        allowed = samples <= every and way.share in shares and own <= way.fused <= may
        if allowed and takes(way, samples) <= room:
            say(f"memory {given}: {samples} per pass{way.told()[0]}, as before")
            return _with(config, train=before)
    for fused in [own, True] if _may_fuse(config, setting, alone) and not own else [own]:
        ways = [Way(share, fused) for share in shares]
        fits = bisect_left(ways, True, key=lambda way: smallest(way) <= room)  # a larger share takes less
        if fits == len(ways):
            continue
        way = ways[fits]
        samples, needs = every, takes(way, every)
        if needs > room and not way.fused:
            # Not guessed from the first two: where the optimizer's step takes more than their passes they tell nothing.
            samples = 1 + bisect_right(range(2, every), room, key=partial(takes, way))
            needs = takes(way, samples)
        words, price = way.told()
        say(f"memory {given}: {samples} per pass{words}, {needs / 1e9:.2f} GB{price}")
        return _with(config, train={**way.options, "micro_batch": samples})
    way = min(Way(1.0, own), Way(1.0, fused), key=smallest)
    further = _NARROWER if config.adapter or config.token else _FURTHER
    costs = list[str]()
    for name, change in further:
        other = _with(config, **change)
        lowest = Way(1.0, _may_fuse(other, setting, alone))
        other = _with(other, train=lowest.options)
        costs.append(f"{name}: {together(other, lowest.least(every)) / 1e9:.2f} GB")
    what = f"the smallest step takes {smallest(way) / 1e9:.2f} GB: {way.least(every)} per pass{way.told()[0]}"
    raise UserError(what, f"train.memory = {given}", f"these change what is computed: {'; '.join(costs)}")


def _shares(config: Config, sdxl: SDXL) -> list[float]:
    """Shares of the blocks that may be computed again, from the config's own on."""
    own = float(config.train.gradient_checkpointing)
    split = isinstance(sdxl.unet, unets.UNet) and config.model.attention == "sdpa"
    return sorted({own, 1.0} | ({share for share in _SHARES if share > own} if split else set()))


def _may_fuse(config: Config, setting: Step, alone: bool) -> bool:
    return alone and setting.micro_batches == 1 and guards.may_fuse(config)


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _together(count: Count, sdxl: SDXL, groups: list[Group], setting: Step, config: Config, samples: int) -> float:
    passes = -(-setting.shape[0] * setting.micro_batches // samples)
    precision = "bf16" if config.train.weights == "bf16" and setting.device != "cpu" else setting.precision
    changed = replace(setting, shape=(samples, *setting.shape[1:]), micro_batches=passes, precision=precision)
    return sum(parts(config, sdxl, groups, changed, count).values())


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive; `peak` is the most there were."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return found

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def _wide_norms() -> Iterator[None]:
    """Norms under autocast as GPUs compute them, and CPUs do not: in fp32, for which what they take is cast and kept.
    Put in their place, since modes of PyTorch do not reach what a backward pass computes again."""
    before = {name: getattr(F, name) for name in ("layer_norm", "group_norm")}
    for name, norm in before.items():
        setattr(F, name, partial(_in_fp32, norm))
    try:
        yield
    finally:
        for name, norm in before.items():
            setattr(F, name, norm)


def _in_fp32(norm: Callable[..., Tensor], *given: Any) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return norm(*given)
    with torch.autocast("cpu", enabled=False):
        return norm(*tree_map_only(Tensor, Tensor.float, given))


def parts(
    config: Config, sdxl: SDXL, groups: list[Group], setting: Step, count: Count | None = None
) -> dict[str, float]:
    """Bytes by what they are for, while training; together they are the peak. The model may be on the meta device, and
    what learns in it is marked. `count` may know passes from before."""
    learns = sum(group.size for group in groups)
    beside = bool(config.adapter or config.token)
    weight = 4 if beside else DTYPES[config.train.weights].itemsize
    kept = narrow.BYTES[setting.precision if config.train.frozen == "auto" else config.train.frozen]
    whole = sum(p.numel() for p in sdxl.parameters())
    freed = config.train.fused_backward
    gradients = 0 if freed else learns * weight
    # bf16 weights that compute in fp32: the pass counts gradients of 4 bytes, and keeps them in 2.
    wider = learns * (4 - weight) if setting.precision == "fp32" and not freed else 0
    shapes = [p.shape for g in groups for p in g.parameters]
    most = learns / backward.PARTS + max(shape.numel() for shape in shapes) if freed else float("inf")
    workspace = optim.workspace_bytes(config.optimizer, shapes, weight, most)
    pass_, stepping = working(config, sdxl, setting, workspace, count) - wider, gradients + workspace
    # Pictures are drawn and losses measured with averages, narrow weights being kept beside; there are no gradients.
    judged = bool(config.ema.enabled and (config.validation.prompts or config.validation.loss_every))
    aside = learns * weight if judged and weight < 4 else 0
    prior = any(data.prior_prediction for data in config.data) and not beside
    return {
        "context and libraries": _LIBRARIES.get(setting.device, 0),
        "weights": learns * weight + (whole - learns) * (kept if beside else weight),
        "frozen base (prior_prediction)": whole * kept * prior,
        "optimizer": learns * optim.state_bytes(config.optimizer, weight),
        "averages (EMA)": learns * 4 if config.ema.enabled else 0,
        "gradients": gradients,
        "activations and workspace": max(pass_, stepping, aside) - gradients,
    }


def working(config: Config, sdxl: SDXL, setting: Step, workspace: float = 0, count: Count | None = None) -> int:
    """Bytes that the passes of a step take at most beside the weights, gradients included; and the optimizer's
    workspace, where the backward pass takes its steps."""
    beside, fused = bool(config.adapter or config.token), config.train.fused_backward
    kept = Pass(
        setting,
        narrow=config.train.weights != "fp32",
        beside=beside,
        checkpointing=float(config.train.gradient_checkpointing),
        workspace=int(workspace) if fused else None,
    )
    return (count or _count)(sdxl, kept)


def _count(sdxl: SDXL, given: Pass) -> int:
    setting, compute = given.setting, DTYPES[given.setting.precision]
    mixed = setting.precision != "fp32" and not given.narrow
    inputs = torch.float32 if mixed else compute
    with _fake(sdxl, torch.float32 if mixed and not given.beside else compute, given) as fake:
        samples, text = setting.shape[0], _text(fake, setting, inputs)
        noisy = torch.empty(samples, fake.unet.config["in_channels"], *setting.shape[1:], dtype=inputs)
        time_ids = torch.zeros(samples, 6, dtype=torch.int64)
        norms = _wide_norms() if setting.device != "cpu" else nullcontext()
        with Live([*fake.parameters(), *fake.buffers()]) as live, norms:
            for _ in range(min(setting.micro_batches, 2)):  # from the second on gradients lie there already
                with torch.autocast("cpu", compute, cache_enabled=False) if mixed else nullcontext():
                    found = fake(noisy, torch.zeros(samples), time_ids, **text)
                loss = found.float().square().mean()
                del found
                if given.workspace is not None:
                    learning = [p for p in fake.parameters() if p.requires_grad]
                    backward.step(_Stepping(given.workspace), learning, loss, None, loss.backward)
                else:
                    loss.backward()
    return live.peak


class _Stepping:
    """An optimizer that holds so many bytes for a moment, and does nothing."""

    def __init__(self, workspace: int) -> None:
        self.workspace = workspace

    def step(self) -> None:
        torch.empty(self.workspace, dtype=torch.uint8)


def _text(fake: SDXL, setting: Step, inputs: torch.dtype) -> dict[str, Tensor]:
    """What a step's text is without values: token ids where encoders learn, else their embeddings."""
    samples, tokens = setting.shape[0], setting.tokens
    if fake.text_encoder_2 is not None:
        rows = torch.zeros(samples, 1, dtype=torch.int64)
        ids = torch.zeros(samples, 2, tokens, dtype=torch.int64)
        return {"tokens": ids, "chunks": rows, "kept": torch.ones(samples, 2)}
    settings = fake.unet.config
    pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    states = torch.empty(samples, tokens, settings["cross_attention_dim"], dtype=inputs)
    return {"prompt_embeds": states, "pooled": torch.empty(samples, pooled, dtype=inputs)}


@contextmanager
def _fake(sdxl: SDXL, dtype: torch.dtype, given: Pass) -> Iterator[Any]:
    """A copy of the model with fake weights, which stands for one on the pass's device; what is injected stays in
    fp32."""
    from torch._subclasses import FakeTensorMode

    made: Any = copy.deepcopy(sdxl).to("meta")
    before, kernels.stands_for = kernels.stands_for, given.setting.device
    try:
        with FakeTensorMode():
            for module in made.modules():
                for name, p in module.named_parameters(recurse=False):
                    kind = torch.float32 if given.beside and p.requires_grad else dtype
                    fake = nn.Parameter(torch.empty(p.shape, dtype=kind), requires_grad=p.requires_grad)
                    module._parameters[name] = fake
                for name, b in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
            if given.checkpointing:
                model.checkpoint_activations(made, given.checkpointing)
            made.train()
            for layer in adapters.layers(made) if given.beside else ():
                layer.eval()  # what they drop is drawn, and here nothing has a value; a mask is small
            yield made
    finally:
        kernels.stands_for = before
