"""Every method: what its rules name moves and nothing else does, and an interrupted run ends bitwise like a whole one.

New words, narrow bases, prior prediction and what adapters draw have tests of their own beside this one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_trainer import setup
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import CONTINUE, Stop
from sdxl_trainer.train import _loop, train

ALL = ["unet", "text_encoder", "text_encoder_2"]
# Options, and expressions of which a parameter's name matches one if and only if it moves.
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "full": ({}, (r"unet\..*",)),
    "full, gradients freed": (
        {"train": {"fused_backward": True}, "optimizer": {"name": "adafactor"}},
        (r"unet\..*",),
    ),
    "full, one text encoder": (
        {"learn": [{"match": r"unet\..*"}, {"match": r"text_encoder_2\..*", "learning_rate": 1e-4}]},
        (r"unet\..*", r"text_encoder_2\..*"),
    ),
    "attention": ({"learn": [{"match": r"unet\..*attn\d\..*"}]}, (r"unet\..*attn\d\..*",)),
    "rates by block": (
        {
            "learn": [
                {"match": r"unet\.up_blocks\.0\..*", "learning_rate": 0.0},
                {"match": r"unet\.up_blocks\..*", "learning_rate": 1e-4},
                {"match": r"unet\.mid_block\..*", "learning_rate": 1e-3},
            ]
        },
        (r"unet\.up_blocks\.[1-9]\..*", r"unet\.mid_block\..*"),
    ),
    "LoCon, ranks and alphas": (
        {
            "adapter": {
                "rank": 4, "targets": "all", "conv_rank": 2, "ranks": {r"unet\.mid_block\..*to_q": 1},
                "alphas": {r"unet\..*\.attn2\..*": 3.0},
            }
        },
        (r"unet\..*\.lora_[AB]\..*",),
    ),
    "DoRA, text encoders": (
        {"adapter": {"kind": "dora", "rank": 2, "parts": ALL, "dropout": 0.1}},
        (r".*\.lora_[AB]\..*", r".*\.lora_magnitude_vector\..*"),
    ),
    "LoRA+, rsLoRA": (
        {
            "adapter": {"rank": 4, "rslora": True},
            "learn": [{"match": r".*\.lora_B\..*", "learning_rate": 1e-2}, {"match": ".*"}],
        },
        (r"unet\..*\.lora_[AB]\..*",),
    ),
    "LoHa": ({"adapter": {"kind": "loha", "rank": 2, "targets": "all"}}, (r"unet\..*\.hada_w[12]_[ab]\..*",)),
    "LoKr, whole factors and products": (
        {"adapter": {"kind": "lokr", "factor": 4, "rank": 6, "targets": "all", "parts": ALL}},
        (r".*\.lokr_w(1|2|2_[ab])\..*",),
    ),
    "OFT": ({"adapter": {"kind": "oft", "block_size": 8}}, (r"unet\..*\.oft_R\..*",)),
    "BOFT": (
        {"adapter": {"kind": "boft", "targets": r"unet\.mid_block\..*to_v"}}, (r"unet\.mid_block\..*\.boft_[Rs]\..*",)
    ),
    "pivotal tuning": (
        {
            "token": [{"name": "<x>", "vectors": 2}],
            "adapter": {"rank": 2},
            "data": [{"caption": "a <x>", "caption_only": True}],
            "learn": [{"match": r".*token_embedding.*", "until": 0.6}, {"match": ".*"}],
        },
        (r"unet\..*\.lora_[AB]\..*", r"text_encoder(_2)?\..*token_embedding\.new.*"),
    ),
    "masks and weights": (
        {"adapter": {"rank": 2}, "data": [{"mask": "alpha", "unmasked_weight": 0.1, "weight": 0.5}]},
        (r"unet\..*\.lora_[AB]\..*",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_only_what_is_named_moves_and_resume_is_bitwise(config: Callable[..., Any], name: str) -> None:
    import re

    sections, expected = METHODS[name]
    lengths = {"steps": 4, "checkpoint_every": 3, "learning_rate": 1e-3}
    options = config(**{**sections, "train": {**lengths, **sections.get("train", {})}})
    job = setup.prepare_job(options, CONTINUE)
    assert job is not None
    before = {n: tensor.detach().clone() for n, tensor in job.run.sdxl.state_dict(keep_vars=True).items()}
    _loop(job, Stop())
    for closing in (job.saver, job.metrics, job.validation):
        closing.close()
    after = job.run.sdxl.state_dict(keep_vars=True)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    unread = job.run.sdxl.unused()
    assert moved == {n for n in before if n not in unread and any(re.fullmatch(e, n) for e in expected)}
    output = Path(options.output_dir)
    whole, losses = {n: after[n].detach().clone() for n in moved}, read_metrics(output / "metrics.jsonl")
    assert (output / "checkpoint-3").is_dir()
    again = setup.prepare_job(options, CONTINUE)
    assert again is not None
    assert again.state.step == 3
    _loop(again, Stop())
    for closing in (again.saver, again.metrics, again.validation):
        closing.close()
    resumed = again.run.sdxl.state_dict()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    found = read_metrics(output / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in found] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in losses
    ]


def test_a_lora_that_goes_on_from_another_resumes_bitwise(config: Callable[..., Any], tmp_path: Path) -> None:
    first = train(config(adapter={"rank": 2}, train={"steps": 1, "checkpoint_every": 0}))
    shutil.move(first / "pytorch_lora_weights.safetensors", tmp_path / "a.safetensors")
    adapter = {"rank": 2, "start": str(tmp_path / "a.safetensors")}
    found = []
    for name, lengths in (("whole", (4,)), ("parted", (2, 4))):
        for steps in lengths:
            output = train(config(adapter=adapter, output_dir=str(tmp_path / name), train={"steps": steps}))
        found.append(load_file(output / "pytorch_lora_weights.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
