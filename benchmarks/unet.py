"""A training step of our UNet against the library's: same weights, same inputs, same fused optimizer, in turn.

    python benchmarks/unet.py [--size mid] [--latent 32] [--batch 4] [--rounds 7] [--result unet-intel]

`limit` is the time that the step's floating-point operations take at the speed of the largest matrix products that
PyTorch or oneDNN makes here, measured in the same run.
"""

import time
from collections.abc import Callable
from typing import Any

import common
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trainer import blueprint, kernels
from sdxl_trainer import unet as unets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", default="mid", choices=sorted(blueprint.SIZES))
    parser.add_argument("--latent", type=int, default=32, help="side of the latents")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=sorted(DTYPES))
    parser.add_argument("--result", default="unet", help="name of what is written: of a second machine, unet-its-name")
    options = parser.parse_args()
    config = blueprint.configs(blueprint.SIZES[options.size])["unet"]
    result: dict[str, Any] = {"command": f"python benchmarks/unet.py --size {options.size} --rounds {options.rounds}"}
    result |= {"latent": options.latent, "batch": options.batch, "operations": operations(config, options)}
    for name in [options.only] if options.only else DTYPES:
        result[name] = compare(config, DTYPES[name], options, result["operations"])
        found = result[name]
        print(
            f"{name}: library {found['library']['median']:.3f} s, ours {found['ours']['median']:.3f} s per step, "
            f"{found['speed']['ratio']:.2f} x; {found['of_limit']:.0%} of the limit"
        )
        common.write(options.result, result)


def compare(config: dict[str, Any], dtype: torch.dtype, options: Any, work: float) -> dict[str, Any]:
    torch.manual_seed(0)
    theirs: Any = nn.Module.to(UNet2DConditionModel.from_config(config), dtype).train()
    ours = unets.UNet(config).to(dtype).train()
    ours.load_state_dict(theirs.state_dict())
    given = inputs(config, options, dtype)
    losses: dict[str, list[float]] = {"library": [], "ours": []}
    contestants = {
        "library": step(theirs, given, losses["library"]),
        "ours": step(ours, given, losses["ours"]),
    }
    seconds = common.in_turn(contestants, options.rounds)
    apart = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["library"], strict=True))
    if apart > (1e-3 if dtype == torch.float32 else 2e-2):
        raise SystemExit(f"the losses are {apart:.1%} apart: a faster wrong answer does not count")
    peak = fastest_product(dtype)
    median = {name: {"median": sorted(s)[len(s) // 2], "all": s} for name, s in seconds.items()}
    return {
        **median,
        "speed": common.ratio(seconds, "library", "ours"),
        "losses_apart": apart,
        "peak_operations_per_second": peak,
        "of_limit": work / peak / median["ours"]["median"],
        "library_of_limit": work / peak / median["library"]["median"],
    }


def inputs(config: dict[str, Any], options: Any, dtype: torch.dtype) -> dict[str, Any]:
    draw, count, side = torch.Generator().manual_seed(1), options.batch, options.latent
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added: dict[str, Tensor] = {"text_embeds": torch.randn(count, pooled, generator=draw).to(dtype)}
    added["time_ids"] = torch.full((count, 6), 8 * side)
    return {
        "sample": torch.randn(count, 4, side, side, generator=draw).to(dtype),
        "timestep": torch.randint(0, 1000, (count,), generator=draw),
        "encoder_hidden_states": torch.randn(count, 77, config["cross_attention_dim"], generator=draw).to(dtype),
        "added_cond_kwargs": added,
        "return_dict": False,
    }


def step(unet: nn.Module, given: dict[str, Any], losses: list[float]) -> Callable[[], None]:
    """Forward, backward, fused AdamW on what the step makes of noise: a loss that falls alike for equal models."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    target = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(2))

    def run() -> None:
        loss = (unet(**given)[0].float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    return run


def operations(config: dict[str, Any], options: Any) -> int:
    """Floating-point operations of a step, counted on tensors without values."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        count, side = options.batch, options.latent
        added = {"text_embeds": torch.empty(count, pooled), "time_ids": torch.zeros(count, 6)}
        states = torch.empty(count, 77, config["cross_attention_dim"])
        unets.UNet(config)(torch.empty(count, 4, side, side), torch.zeros(count), states, added)[0].sum().backward()
    return counter.get_total_flops()


def fastest_product(dtype: torch.dtype, side: int = 2048) -> float:
    """Operations per second of a large matrix product, by the faster of two libraries."""
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    best = float("inf")
    for product in (lambda: left @ right.t(), lambda: kernels.linear(left, right, None)):
        for _ in range(4):
            began = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


if __name__ == "__main__":
    main()
