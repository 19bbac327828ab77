"""Class pictures, prior prediction: what is contradictory, missing or too much."""

from typing import Any

import numpy as np
from PIL import Image

from tests.bad_inputs.place import Bad, Place

SUBJECT = {"path": "pictures", "resolution": 64}
CLASS = {"path": "class", "resolution": 64, "caption": "a circle", "generate": 2, "generate_steps": 1}
KEPT = {**SUBJECT, "caption": "a circle", "caption_only": True, "prior_prediction": True}
OTHER = {"output_dir": "other"}


def sets(first: dict[str, Any], second: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**OTHER, **more, "data": [first, second]}


def _three(place: Place) -> None:
    (place / "class").mkdir()
    for number in range(3):
        Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(place / f"class/{number}.png")


def _drawn(place: Place) -> None:
    (place / "class").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(place / "class/00000-0123abcd.png")


# fmt: off
ROWS = [
    Bad("class pictures without a prompt", "generate = 2 without a prompt", "a photo of a dog",
        options=sets(SUBJECT, {**CLASS, "caption": None} | {"caption": ""})),
    Bad("class pictures in a bucket of a store", "cannot be drawn into", "folder on this machine",
        options=sets(SUBJECT, {**CLASS, "path": "s3://pictures"})),
    Bad("fewer class pictures than there are", "generate = 2, but the folder holds 3", "generate = 3", make=_three,
        options=sets(SUBJECT, CLASS)),
    Bad("class pictures of another prompt", "drawn otherwise", "another folder", make=_drawn,
        options=sets(SUBJECT, CLASS)),
    Bad("class pictures into a file", "is a file", "folder", make=lambda p: p.put("class", "x"),
        options=sets(SUBJECT, CLASS)),
    Bad("no class pictures and none asked for", "no such folder|no pictures", "spelling|give a folder",
        options=sets(SUBJECT, {"path": "class", "resolution": 64, "caption": "a circle", "regularisation": True})),
    Bad("settings of drawing without drawing", "generate_steps has no effect without generate", "remove",
        options={"data.0.generate_steps": 5}),
    Bad("negative number of class pictures", "generate = -1", "greater than or equal to 0",
        options={"data.0.generate": -1}),
    Bad("prompts that are not read", "captions of generate_prompts would not be read", "caption_only",
        options=sets(SUBJECT, {**CLASS, "caption_only": True, "generate_prompts": ["a"]})),
    Bad("class pictures with masks", "mask does not go", "remove mask",
        options=sets(SUBJECT, {**CLASS, "mask": "file"})),
    Bad("class pictures of a random base", "such a base knows nothing", "model.init",
        options=sets(SUBJECT, CLASS) | {"model.init": "random"}),
    Bad("class pictures by an inpainting model", "draws nothing from words alone", "SDXL base",
        make=lambda p: p.edit("base/unet/config.json", in_channels=9), options=sets(SUBJECT, CLASS)),
    Bad("a wrong instance folder is found before anything is drawn", "no such folder", "spelling",
        options=sets({**SUBJECT, "path": "nowhere"}, CLASS)),
    Bad("one caption without a caption", "caption_only has no effect without caption", "remove",
        options={"data.0.caption_only": True}),
    Bad("prior prediction alone", "nothing to learn", "prior_prediction = false",
        options={"data.0.prior_prediction": True}),
    Bad("prior prediction of a random base", "such a base knows nothing", "model.init",
        options=sets(SUBJECT, KEPT) | {"model.init": "random"}),
    Bad("prior prediction beside new words alone", "the model stays as it is", "adapter",
        options=sets({**SUBJECT, "trigger": "<x>"}, KEPT, token=[{"name": "<x>"}])),
    Bad("prior prediction of a new word", "which the base does not know", "caption_only", at="data.1",
        options=sets({**SUBJECT, "trigger": "<x>"}, {**KEPT, "caption": "<x>"}, token=[{"name": "<x>"}],
                     adapter={"rank": 2})),
    Bad("prior prediction with another prediction", "the base predicts 'epsilon'", "class pictures",
        options=sets(SUBJECT, KEPT, objective={"prediction": "v_prediction"})),
    Bad("frozen base without anything frozen", "or prior_prediction", "remove",
        options={"train.frozen": "bf16"}),
]
# fmt: on
