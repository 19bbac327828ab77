"""Bad inputs: beginning from a folder, and presets."""

from tests.bad_inputs.place import Bad, Place


def uncaptioned(place: Place) -> None:
    place.remove("pictures/metadata.jsonl")


def written(place: Place) -> None:
    """What an earlier command wrote, for another trigger."""
    place.put(
        "runs/pictures.toml",
        'preset = "lora-object@1"\noutput_dir = "runs/pictures"\n[model]\npath = "base"\n'
        '[[data]]\npath = "pictures"\nresolution = 64\ntrigger = "sks dog"\n[train]\nsteps = 2\n',
    )


START = ("train", "pictures", "--model", "base")
ROWS = [
    Bad(
        "unknown preset",
        "no preset 'lora-charakter'",
        "'lora-character'",
        command=(*START, "--preset", "lora-charakter"),
    ),
    Bad(
        "unknown version of a preset",
        "no version '99' of the preset 'lora-style'",
        "versions: lora-style@1",
        command=(*START, "--preset", "lora-style@99"),
    ),
    Bad("unknown preset shown", "no preset 'lora'", "sdxl presets", command=("presets", "lora")),
    Bad("unknown preset in the config", "no preset 'x@1'", "dreambooth, full", "preset", options={"preset": "x@1"}),
    Bad("preset without version", "'full' has no version", 'preset = "full@1"', "preset", options={"preset": "full"}),
    Bad("preset that is a number", "preset = 1 is not allowed", "text, in quotes", options={"preset": 1}),
    Bad(
        "neither captions nor a trigger",
        "6 pictures have no caption",
        "give --trigger",
        make=uncaptioned,
        command=START,
    ),
    Bad(
        "no such model", "there is no model 'bas'", "hub id", "--model", command=("train", "pictures", "--model", "bas")
    ),
    Bad("a run as pictures", "result of a run", "sdxl train run/config.toml", command=("train", "run")),
    Bad("a model as pictures", "holds a model", "--model base", command=("train", "base")),
    Bad(
        "a command that contradicts its file",
        "says data.0.trigger = 'sks dog'; the command says 'sks cat'",
        "--name",
        "runs/pictures.toml",
        make=written,
        command=(*START, "--trigger", "sks cat"),
    ),
    Bad("a name with a slash", "'a/b' cannot be the name", "slashes", command=(*START, "--name", "a/b")),
    Bad(
        "a picture as pictures",
        "is one picture",
        "give its folder: pictures",
        make=lambda p: p.put("pictures/one.png", b""),
        command=("train", "pictures/one.png", "--trigger", "sks"),
    ),
    Bad("no such folder", "there is no folder 'photoz'", "pictures", command=("train", "photoz", "--trigger", "sks")),
    Bad(
        "a trigger beside a config",
        "--trigger is for beginning from a folder",
        'data.0.trigger="sks"',
        command=("train", "config.toml", "--trigger", "sks"),
    ),
]
