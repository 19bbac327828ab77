"""The recipes in docs/launch are what their programs read, and start what there is, with options that there are."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from sdxl_trainer.configfile import override, validated

LAUNCH = Path(__file__).parent.parent / "docs" / "launch"
SCRIPTS, DOCUMENTS = sorted(LAUNCH.glob("*.sh")), sorted(LAUNCH.glob("*.yaml"))


def command_of(text: str) -> list[str]:
    """The words of the command that trains, without the launcher's."""
    joined = text.replace("\\\n", " ")
    line = next(line for line in joined.splitlines() if "-m sdxl_trainer" in line)
    return shlex.split(line.partition("-m sdxl_trainer")[2])


def check(words: list[str], tree: dict[str, Any]) -> None:
    assert words[0] == "train"
    assert words[1].endswith("config.toml")
    for text in words[2:]:
        override(tree, text)
    assert validated(tree, "recipe")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts(path: Path, tree: Callable[..., dict[str, Any]]) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    check(command_of(text), tree())
    launcher = shlex.split(text.replace("\\\n", " ").rpartition("torchrun ")[2].partition("-m sdxl_trainer")[0])
    given, rest = get_args_parser().parse_known_args([*launcher, "sdxl_trainer"])
    assert rest == []
    assert given.nproc_per_node == "gpu"


def test_slurm_asks_for_time_to_save() -> None:
    text = (LAUNCH / "slurm.sh").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, flags=re.MULTILINE))
    assert asked["signal"].startswith("TERM@")
    assert "requeue" in asked
    assert asked["ntasks-per-node"] == "1", "torchrun starts the processes of a node"


def test_kubernetes(tree: Callable[..., dict[str, Any]]) -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "OnFailure"
    assert pod["terminationGracePeriodSeconds"] >= 60
    [container] = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}
    check(command_of(shlex.join(container["command"])), tree())


def test_skypilot(tree: Callable[..., dict[str, Any]]) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task.keys() == {"name", "resources", "file_mounts", "setup", "run"}
    made = tree()
    check(command_of(task["run"]), made)
    assert made["train"]["checkpoint_mirror"].startswith("s3://")


def test_every_recipe_is_listed() -> None:
    page = (LAUNCH / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in page for path in [*SCRIPTS, *DOCUMENTS])
