"""Bad inputs: obstacles in the output folder, the environment, and the commands beside train."""

import os

from tests.bad_inputs.model_rows import TEXT, UNET, poison
from tests.bad_inputs.place import Bad, Place


def in_the_way(place: Place, name: str) -> None:
    """A file where a folder will be."""
    place.remove(name)
    place.put(name, "in the way")


def folder_in_the_way(place: Place, name: str) -> None:
    place.remove(name)
    place.put(f"{name}/in the way", "")


def dangling(place: Place, name: str) -> None:
    """What a download that was tidied up badly leaves."""
    place.remove(name)
    (place / name).symlink_to("blobs/gone")


def pipe(place: Place, name: str) -> None:
    """Opening it for reading would wait for ever."""
    place.remove(name)
    os.mkfifo(place / name)


CHECK = ("check", "config.toml")
SAMPLE = ("sample", "base", "--prompt", "a red circle", "--out", "drawn")
PICTURES = {"validation.prompts": ["a red circle"], "validation.images": 1, "validation.steps": 1}
REPOSITORY = {"hub.push": True, "hub.id": "a b/c d"}
ROWS = [
    Bad("a repository of no name", "'a b/c d' cannot be the name", "you/name", "hub.id", options=REPOSITORY),
    Bad(
        "check of a repository of no name",
        "'a b/c d' cannot be",
        "you/name",
        "hub.id",
        options=REPOSITORY,
        command=CHECK,
    ),
    Bad(
        "an output folder that no repository can be called by",
        "'my run' cannot be",
        "set hub.id",
        "hub.id",
        options={"hub.push": True, "output_dir": "my run"},
        command=CHECK,
    ),
    Bad(
        "a file in place of a checkpoint",
        "cannot write: not a directory|cannot write: file exists",
        "is a file",
        "checkpoint-4",
        make=lambda p: in_the_way(p, "run/checkpoint-4"),
        begins=True,
    ),
    Bad(
        "a file in place of the samples",
        "cannot write: (not a directory|file exists)",
        "is a file",
        "samples",
        make=lambda p: in_the_way(p, "run/samples"),
        options=PICTURES,
        begins=True,
    ),
    Bad(
        "a file in place of the logs",
        "cannot write: (not a directory|file exists)",
        "is a file",
        "logs",
        make=lambda p: in_the_way(p, "run/logs"),
        options={"log.trackers": ["tensorboard"]},
    ),
    Bad(
        "a folder in place of the metrics",
        "is a directory",
        "in the way",
        "metrics.jsonl",
        make=lambda p: folder_in_the_way(p, "run/metrics.jsonl"),
    ),
    Bad(
        "output_dir is the base",
        "output_dir and model.path are one folder",
        "another output_dir",
        options={"output_dir": "base"},
    ),
    Bad(
        "output_dir inside of the data",
        "output_dir lies in data.0.path",
        "outside",
        options={"output_dir": "pictures/run"},
    ),
    Bad("weights are a dangling link", "leads nowhere", "copy or download", UNET, make=lambda p: dangling(p, UNET)),
    Bad("weights are a pipe", "not a file", "copy or download", TEXT, make=lambda p: pipe(p, TEXT)),
    Bad(
        "weights are a Git LFS pointer",
        "Git LFS pointer",
        "git lfs pull",
        UNET,
        make=lambda p: p.put(UNET, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    Bad(
        "launcher accumulates",
        "4 gradient accumulation steps",
        "train.micro_batch",
        make=lambda p: p.patch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
    ),
    Bad(
        "launcher wants fp8",
        "mixed precision 'fp8'",
        "train.precision",
        make=lambda p: p.patch.setenv("ACCELERATE_MIXED_PRECISION", "fp8"),
    ),
    Bad(
        "check: no captions",
        "have no caption",
        "beside each",
        command=CHECK,
        make=lambda p: p.remove("pictures/metadata.jsonl"),
    ),
    Bad("check: part missing", "no 'vae'", "complete SDXL", command=CHECK, make=lambda p: p.remove("base/vae")),
    Bad(
        "check: rule matches nothing",
        "decides nothing",
        "names look like",
        command=CHECK,
        options={"learn": [{"match": "vae.*"}], "output_dir": "new"},
    ),
    Bad(
        "check: tracker unknown", "no tracker 'wandbb'", "'wandb'", command=CHECK, options={"log.trackers": ["wandbb"]}
    ),
    Bad("check: resume with another seed", "seed = 0, not 1", "set seed back", command=CHECK, options={"seed": 1}),
    Bad(
        "cache: truncated JPEG",
        "zero bytes",
        "restore",
        command=("cache", "config.toml"),
        make=lambda p: p.picture("none.png", b""),
    ),
    Bad("cache: verify and gc", "two jobs", "one of them", command=("cache", "config.toml", "--verify", "--gc")),
    Bad(
        "sample: no model",
        "does not exist",
        "existing folder",
        command=("sample", "no/such/dir/model", "--prompt", "a"),
    ),
    Bad(
        "sample: out is a file",
        "cannot write: file exists",
        "is a file",
        "config.toml",
        command=(*SAMPLE[:-1], "config.toml"),
    ),
    Bad("sample: size not of eights", "--height 60", "56 or 64", command=(*SAMPLE, "--height", "60")),
    Bad("sample: no steps", "'--steps'", "sdxl sample --help", command=(*SAMPLE, "--steps", "0")),
    Bad(
        "sample: NaN in the UNet",
        "not finite",
        "undamaged",
        "unet",
        command=SAMPLE,
        make=lambda p: p.weights(UNET, poison),
    ),
    Bad("report: no folder", "no folder 'nowhere'", "output_dir", command=("report", "nowhere")),
    Bad("report: no run", "no run in 'pictures'", "output_dir", command=("report", "pictures")),
    Bad("demo: out is a file", "cannot write", "is a file", command=("demo", "--out", "config.toml", "--steps", "1")),
]
