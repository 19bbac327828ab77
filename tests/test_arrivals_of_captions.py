"""Where kohya's configs say that captions are: the JSON of its fine-tuning scripts, and files with other endings."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trainer import configfile
from sdxl_trainer.data import sources
from sdxl_trainer.errors import UserError
from tests.test_arrivals import FIXTURES, converted, lines_of


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    with contextlib.chdir(tmp_path):
        yield tmp_path


FINETUNING = {"sdxl_checkbox": True, "image_folder": "pictures", "train_dir": "work", "batch_size": "2", "epoch": 3}
FINETUNING |= {"caption_metadata_filename": "meta_cap.json", "latent_metadata_filename": "meta_lat.json"}
FINETUNING |= {"max_resolution": "512,512", "pretrained_model_name_or_path": "base", "dataset_repeats": "4"}


@pytest.mark.parametrize(
    ("more", "metadata"),
    [
        ({"generate_caption_database": True}, None),
        ({"generate_caption_database": False}, "work/meta_cap.json"),
        ({"use_latent_files": "Yes"}, "work/meta_lat.json"),
    ],
)
def test_the_window_s_page_for_whole_models(more: dict[str, Any], metadata: str | None, here: Path) -> None:
    """Its captions: the JSON that it made, or the files that it would make it of."""
    Path("window.json").write_text(json.dumps(FINETUNING | more))
    config, lines = converted("window.json")
    data = config.data[0]
    assert (data.path, data.metadata, data.kohya_folders) == ("pictures", metadata, False)
    assert (data.buckets, data.repeats, config.train.batch_size, config.adapter) == ("area", 4, 2, None)
    assert not lines_of("unknown", lines)


def test_kohya_s_metadata_and_endings(here: Path) -> None:
    Path("command.sh").write_text(
        "accelerate launch sdxl_train.py --pretrained_model_name_or_path base --resolution 64 --train_data_dir pictures"
        " --in_json meta_lat.json --enable_wildcard --caption_extension .tags"
    )
    data = converted("command.sh")[0].data[0]
    assert (data.metadata, data.caption_extension, data.kohya_folders) == ("meta_lat.json", None, False)
    Path("data.toml").write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "pictures"\nmetadata_file = "m.json"\n'
        '[[datasets.subsets]]\nimage_dir = "photos"\ncaption_extension = ".tags"\n'
    )
    Path("own.toml").write_text('pretrained_model_name_or_path = "base"\ndataset_config = "data.toml"\n')
    first, second = converted("own.toml")[0].data
    assert (first.metadata, second.caption_extension) == ("m.json", ".tags")


@pytest.mark.parametrize(
    "name", ["kohya-gui.json", "kohya-lora.toml", "kohya-data.toml", "ai-toolkit.yaml", "diffusers.sh"]
)
def test_a_run_of_another_trainer_s_config_says_how_to_convert_it(name: str) -> None:
    with pytest.raises(UserError, match="this is no config of ours") as caught:
        configfile.load(FIXTURES / name)
    assert caught.value.fix == f"sdxl convert {FIXTURES / name} ours.toml"


def test_an_ending_that_no_file_has(here: Path) -> None:
    """With kohya's scripts it is the way to have the folder's words for all pictures, and their .txt files unread."""
    Path("photos/10_sks dog").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save("photos/10_sks dog/a.png")
    Path("photos/10_sks dog/a.txt").write_text("not this")
    Path("window.json").write_text(
        json.dumps(
            {
                "LoRA_type": "Standard",
                "train_data_dir": "photos",
                "caption_extension": ".txt-no",
                "max_resolution": "64,64",
                "pretrained_model_name_or_path": "base",
            }
        )
    )
    data = converted("window.json")[0].data[0]
    assert [record.captions for record in sources.records(data, seed=0, where="x")] == [("sks dog",)]
