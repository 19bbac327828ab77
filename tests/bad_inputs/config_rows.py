"""Bad inputs: the config file and the command line."""

from tests.bad_inputs.place import Bad

ROWS = [
    Bad("no config file", "there is no config file", "TOML file", make=lambda p: p.config.unlink()),
    Bad(
        "config is a folder",
        "no pictures in the folder",
        "give a folder with pictures",
        make=lambda p: (p.config.unlink(), p.config.mkdir()),
    ),
    Bad("config of zero bytes", "'output_dir' is missing", "output_dir", make=lambda p: p.put("config.toml", "")),
    Bad("TOML syntax", "not valid TOML.*line 1", "quotes", make=lambda p: p.put("config.toml", "seed = = 1")),
    Bad("config not UTF-8", "not UTF-8 text", "UTF-8", make=lambda p: p.put("config.toml", b"a = '\xff'")),
    Bad("unknown key", "unknown key 'sed'", "'seed'", options={"sed": 1}),
    Bad("unknown section", "unknown key 'trian'", "'train'", options={"trian.steps": 1}),
    Bad(
        "unknown key in a section",
        "unknown key 'train.learning_rat'",
        "'learning_rate'",
        options={"train.learning_rat": 1},
    ),
    Bad(
        "unknown key where another is missing",
        r"unknown key 'token.0.nam' \(1 more problem after this one\)",
        "'name'",
        options={"token": [{"nam": "<x>"}]},
    ),
    Bad("unknown key in a list", "unknown key 'data.0.resolutoin'", "'resolution'", options={"data.0.resolutoin": 64}),
    Bad(
        "unknown size of a UNet",
        "unknown key 'model.unet.block_out_channel'",
        "'block_out_channels'",
        command=("train", "config.toml", "model.init=random", "model.unet.block_out_channel=[16, 16, 16]"),
    ),
    Bad(
        "width that the encoders decide",
        "unknown key 'model.unet.cross_attention_dim'",
        "it follows from the text encoders",
        command=("train", "config.toml", "model.init=random", "model.unet.cross_attention_dim=2048"),
    ),
    Bad(
        "sizes of a trained UNet",
        "model.unet = .*has no effect",
        "remove",
        command=("train", "config.toml", "model.unet.sample_size=8"),
    ),
    Bad(
        "sizes that are a value", "model.unet = 3", r"\[model.unet\]", options={"model.init": "random", "model.unet": 3}
    ),
    Bad(
        "a level too few",
        "block_out_channels has 2 numbers",
        "give 3 numbers",
        command=("train", "config.toml", "model.init=random", "model.unet.block_out_channels=[16, 32]"),
    ),
    Bad("text for a number", 'train.steps = "many"', "integer", options={"train.steps": "many"}),
    Bad("number for text", "model.path = 3", "string", options={"model.path": 3}),
    Bad("fraction for a whole number", "train.batch_size = 1.5", "integer", options={"train.batch_size": 1.5}),
    Bad("a section that is a value", "train = 5", r"\[train\]", options={"train": 5}),
    Bad("data as one table", "data = ", r"\[\[data\]\]", options={"data": {"path": "x"}}),
    Bad("no data", r"data = \[\]", r"\[\[data\]\]", options={"data": []}),
    Bad("negative number", "train.learning_rate = -1", "greater than 0", options={"train.learning_rate": -1.0}),
    Bad("share above 1", "caption_dropout = 1.5", "less than or equal to 1", options={"data.0.caption_dropout": 1.5}),
    Bad(
        "share or switch above 1",
        r"train.gradient_checkpointing = 1.5 is not allowed",
        "true, false or a number from 0 to 1",
        options={"train.gradient_checkpointing": 1.5},
    ),
    Bad(
        "an interval of no epochs",
        'train.checkpoint_every = "0 epochs" is not allowed',
        "steps, 0 for never, or epochs as text, such as '2 epochs'",
        options={"train.checkpoint_every": "0 epochs"},
    ),
    Bad(
        "an interval of no steps",
        "validation.loss_every = 0 is not allowed",
        "steps from 1 on, or epochs as text, such as '2 epochs'",
        options={"validation.loss_every": 0},
    ),
    Bad("not a number", "train.learning_rate = NaN", "finite", make=lambda p: _nan(p)),
    Bad("unknown choice", 'optimizer.name = "adam"', "adamw", options={"optimizer.name": "adam"}),
    Bad("empty path", 'output_dir = ""', "path", options={"output_dir": ""}),
    Bad("path with a zero byte", "output_dir = .*is not allowed", "zero byte", options={"output_dir": "a\x00b"}),
    Bad("data path with a zero byte", "data.0.path = .*is not allowed", "zero byte", options={"data.0.path": "a\x00b"}),
    Bad(
        "data path of nobody",
        "data.0.path = .*is not allowed",
        "no-such-user",
        options={"data.0.path": "~no-such-user/x"},
    ),
    Bad("empty data path", 'data.0.path = ""', "it is empty", options={"data.0.path": ""}),
    Bad("negative seed", "seed = -1", "greater than or equal to 0", options={"seed": -1}),
    Bad("home of nobody", "output_dir = .*is not allowed", "no-such-user", options={"output_dir": "~no-such-user/x"}),
    Bad("steps and epochs", "both given", "exactly one", options={"train.epochs": 2}),
    Bad("neither steps nor epochs", "neither", "exactly one", make=lambda p: p.tree["train"].pop("steps")),
    Bad("micro_batch above batch_size", "micro_batch = 3 is more than", "batch_size", options={"train.micro_batch": 3}),
    Bad(
        "fused backward, several passes",
        "fused_backward with 1 of 2 images per pass",
        "remove train.micro_batch",
        options={"train.fused_backward": True, "train.micro_batch": 1, "train.batch_size": 2},
    ),
    Bad(
        "fused backward beside an adapter",
        "fused_backward with an adapter",
        "remove train.fused_backward",
        options={"train.fused_backward": True, "adapter.rank": 4},
    ),
    Bad(
        "fused backward with muon",
        "muon steps on all tensors at once",
        "adafactor, adamw",
        options={"train.fused_backward": True, "optimizer.name": "muon"},
    ),
    Bad(
        "fused backward, rules that end",
        "fused_backward with learn.until",
        "remove one",
        options={"train.fused_backward": True, "learn": [{"match": "unet.*mid.*", "until": 0.5}, {"match": ".*"}]},
    ),
    Bad("micro_batch of zero", "train.micro_batch = 0", "greater than 0", options={"train.micro_batch": 0}),
    Bad("resolution not of eights", "data.0.resolution = 100", "96 or 104", options={"data.0.resolution": 100}),
    Bad(
        "validation size not of eights",
        "validation.height = 60",
        "56 or 64",
        options={"validation.prompts": ["a"], "validation.height": 60},
    ),
    Bad(
        "option without effect",
        "schedule.warmup_steps = 9 has no effect",
        "remove",
        options={"schedule.warmup_steps": 9},
    ),
    Bad("crops without random", "crops_per_image has no effect", "random", options={"data.0.crops_per_image": 2}),
    Bad(
        "zero terminal SNR with epsilon",
        "zero_terminal_snr",
        "v_prediction",
        options={"objective.zero_terminal_snr": True, "objective.prediction": "epsilon"},
    ),
    Bad(
        "timestep range backwards",
        "timesteps.begin = 900 is not before",
        "begin is the first",
        options={"timesteps.bias": "range", "timesteps.begin": 900, "timesteps.end": 100},
    ),
    Bad(
        "timestep range beyond the schedule",
        "timesteps.end = 2000",
        "1000",
        options={"timesteps.bias": "range", "timesteps.begin": 900, "timesteps.end": 2000, "output_dir": "new"},
    ),
    Bad(
        "bf16 weights in fp16",
        "train.weights = 'bf16'",
        "remove",
        options={"train.weights": "bf16", "train.precision": "fp16"},
    ),
    Bad(
        "override without value",
        "'train.steps' is not an override",
        "section.key=value",
        command=("train", "config.toml", "train.steps"),
    ),
    Bad(
        "override of an unknown key",
        "unknown key 'train.stepz'",
        "'steps'",
        command=("train", "config.toml", "train.stepz=1"),
    ),
    Bad("override of a list", "names a list", "data.0", command=("train", "config.toml", "data.resolution=64")),
    Bad(
        "override of no entry",
        "'7' in .* is not an entry",
        "0 to 0",
        command=("train", "config.toml", "data.7.resolution=64"),
    ),
    Bad(
        "override below a value", r"seed = \{.*is not allowed", "integer", command=("train", "config.toml", "seed.x=1")
    ),
    Bad("override of nothing", "is not an override", "section.key=value", command=("train", "config.toml", "=3")),
    Bad(
        "unknown command",
        "No such command 'trian'. Did you mean 'train'",
        "sdxl --help",
        "sdxl",
        command=("trian", "config.toml"),
    ),
    Bad("the studio by its name", "No such command 'studio'", "the studio is: sdxl ui", "sdxl", command=("studio",)),
    Bad(
        "unknown option", "No such option: --frehs", "--help", "sdxl train", command=("train", "config.toml", "--frehs")
    ),
    Bad(
        "tracker unknown",
        "no tracker 'tensorbord'",
        "'tensorboard'",
        "log.trackers",
        options={"log.trackers": ["tensorbord"]},
    ),
    Bad("tracker not installed", "'aim' is not installed", "pip install aim", options={"log.trackers": ["aim"]}),
    Bad(
        "rule matches nothing",
        r"'unet\\\.attn' decides nothing",
        "names look like",
        "learn.0.match",
        options={"learn": [{"match": r"unet\.attn"}], "output_dir": "new"},
    ),
    Bad(
        "rule is no expression",
        "not a regular expression",
        "for example",
        "learn.0",
        options={"learn": [{"match": "("}], "output_dir": "new"},
    ),
    Bad(
        "nothing learns",
        "nothing learns",
        "positive",
        options={"learn": [{"match": ".*", "learning_rate": 0.0}], "output_dir": "new"},
    ),
]


def _nan(place):
    text = place.config.read_text().replace("learning_rate = 0.001", "learning_rate = nan")
    place.put("config.toml", text)
