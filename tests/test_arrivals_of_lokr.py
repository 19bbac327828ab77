"""LoKr in the configs of other trainers: their factors and whole matrices, each under its own name."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_arrivals import converted, here, lines_of

__all__ = ["here"]  # the fixture


@pytest.mark.parametrize(
    ("given", "factor", "rank", "alpha", "conv"),
    [
        ({"factor": 8}, 8, 8, 4.0, (4, 1.0)),
        ({"factor": 8, "full_matrix": True}, 8, 100_000, None, (None, None)),
        ({"factor": -1, "network_dim": 64}, None, 64, None, (4, 1.0)),
        ({"factor": 16, "network_dim": 10_000, "conv_dim": 10_000}, 16, 10_000, None, (10_000, None)),
    ],
)
def test_factors_of_lycoris(here: Path, given: dict[str, Any], factor: Any, rank: int, alpha: Any, conv: Any) -> None:
    """Where the second factor is whole there is no alpha, there as here, and none in the config."""
    tree = json.loads(Path("kohya-gui.json").read_text()) | given
    Path("lokr.json").write_text(json.dumps(tree))
    if "full_matrix" in given:  # the window has no box for it; the option goes through sd-scripts' own arguments
        Path("lokr.toml").write_text(
            'pretrained_model_name_or_path = "base"\ntrain_data_dir = "photos"\noutput_dir = "o"\n'
            'resolution = "64"\nnetwork_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_alpha = 4\n'
            'network_args = ["algo=lokr", "factor=8", "full_matrix=True", "conv_dim=4", "conv_alpha=1"]\n'
        )
    config, _ = converted("lokr.toml" if "full_matrix" in given else "lokr.json")
    made = config.adapter
    assert (made.kind, made.factor, made.rank, made.alpha) == ("lokr", factor, rank, alpha)
    assert (made.conv_rank, made.conv_alpha) == conv


def test_factors_of_the_others(here: Path) -> None:
    toolkit = Path("ai-toolkit.yaml").read_text()
    network = "{type: lora, linear: 16, linear_alpha: 8, conv: 4, conv_alpha: 2}"
    assert network in toolkit
    Path("whole.yaml").write_text(toolkit.replace(network, "{type: lokr, linear: 16, lokr_factor: 8}"))
    Path("parts.yaml").write_text(
        toolkit.replace(network, "{type: lokr, linear: 4, linear_alpha: 2, lokr_full_rank: false}")
    )
    one_trainer = json.loads(Path("onetrainer.json").read_text())
    lokr = {"peft_type": "LOKR", "lokr_dim": 4, "lokr_decompose_factor": 4, "lokr_decompose_both": True}
    Path("one.json").write_text(json.dumps(one_trainer | lokr))
    Path("one-whole.json").write_text(json.dumps(one_trainer | lokr | {"lokr_full_matrix": True}))
    tuner = {**json.loads(Path("simpletuner.json").read_text()), "--lora_type": "lycoris", "--use_dora": False}
    Path("simple.json").write_text(json.dumps(tuner | {"--lycoris_config": "lycoris.json"}))
    own = {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}}
    preset = {"target_module": ["Attention", "FeedForward"], "module_algo_map": own}
    lycoris = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10_000, "linear_alpha": 1, "apply_preset": preset}
    Path("lycoris.json").write_text(json.dumps(lycoris))
    found = {}
    for name in ("whole.yaml", "parts.yaml", "one.json", "one-whole.json", "simple.json"):
        made = converted(name)[0].adapter
        found[name] = (made.kind, made.factor, made.rank, made.alpha)
    assert found == {
        "whole.yaml": ("lokr", 8, 100_000, None),
        "parts.yaml": ("lokr", None, 4, 2.0),
        "one.json": ("lokr", 4, 4, 2.0),
        "one-whole.json": ("lokr", 4, 100_000, None),
        "simple.json": ("lokr", 16, 10_000, None),
    }
    assert "lokr_decompose_both" in lines_of("dropped", converted("one.json")[1])
    assert "are one here: 16" in lines_of("note", converted("simple.json")[1])
