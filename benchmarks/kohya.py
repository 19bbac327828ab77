"""Seconds per sample of kohya's input pipeline, from an unmodified checkout of sd-scripts. Started by `peers.py`:

    python benchmarks/kohya.py SD_SCRIPTS FOLDER [--samples 16] [--batches 64] [--batch 4]

The files are those that its caching writes for SDXL at 1024 pixels in fp32 or bf16, written here by the functions that
write them there, with random numbers in them. The data set is then made of a config, shown its files and put behind a
DataLoader by the calls that `sdxl_train.py` makes, in their order; what is timed is the loop over that loader, the
median of five epochs after a first. It reads in this process, without workers, as ours is measured; epochs are as long
as what is timed, so that it pays for none of their ends.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from multiprocessing import Value
from pathlib import Path
from typing import Any

import launch
import numpy as np
import torch

SIDE = 1024
SHAPES = {"hidden_state1": (77, 768), "hidden_state2": (77, 1280), "pool2": (1280,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    launch.declare_torchvision()
    fill_in()
    sys.path.insert(0, str(options.checkout))
    for number in range(options.samples):
        write(options.folder, number)
    loader = made(options.folder, options.batch, options.batches * options.batch // options.samples)
    if len(loader) != options.batches:
        raise SystemExit(f"{len(loader)} batches an epoch instead of {options.batches}")
    taken = [read(loader) for _ in range(6)]
    print(json.dumps(statistics.median(taken[1:]) / (options.batches * options.batch)))


def fill_in() -> None:
    """Names that its files import and the installed libraries no longer have; the data set uses none of them."""
    from transformers import CLIPTextModel  # noqa: F401 - the first model makes the library load itself anew

    sys.modules["transformers"].CLIPFeatureExtractor = object  # type: ignore[attr-defined]


def write(folder: Path, number: int) -> None:
    """A picture, its caption and what is cached of both. The picture is an empty file: its size is told by the name of
    its latents' file, and no one opens it."""
    from library.strategy_sd import SdSdxlLatentsCachingStrategy
    from library.strategy_sdxl import SdxlTextEncoderOutputsCachingStrategy

    picture, draw = folder / f"{number:02}.png", torch.Generator().manual_seed(number)
    picture.touch()
    picture.with_suffix(".txt").write_text(f"photograph number {number}, by the sea, in the evening", encoding="utf-8")
    latents = SdSdxlLatentsCachingStrategy(False, True, 1, False)
    drawn = torch.randn(4, SIDE // 8, SIDE // 8, generator=draw)
    path = latents.get_latents_npz_path(str(picture), (SIDE, SIDE))
    latents.save_latents_to_disk(path, drawn, (SIDE, SIDE), (0, 0, SIDE, SIDE))
    # Its function for text encodes what it writes. This is the call that it ends with.
    rows = {name: torch.randn(shape, generator=draw).numpy() for name, shape in SHAPES.items()}
    np.savez(SdxlTextEncoderOutputsCachingStrategy(True, 1, False).get_outputs_npz_path(str(picture)), **rows)


def made(folder: Path, batch: int, repeats: int) -> Any:
    """The DataLoader of `sdxl_train.py`, with pictures and captions that are all cached. Nothing has to be tokenized
    then, so that no tokenizers are loaded."""
    import sdxl_train
    from library import config_util, strategy_base, strategy_sd, strategy_sdxl, train_util

    line = ["--cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs", "--seed=0"]
    line += ["--cache_text_encoder_outputs_to_disk", "--max_data_loader_n_workers=0", "--resolution=1024"]
    args = sdxl_train.setup_parser().parse_args([*line, f"--train_batch_size={batch}"])
    train_util.prepare_dataset_args(args, True)
    strategy_base.LatentsCachingStrategy.set_strategy(
        strategy_sd.SdSdxlLatentsCachingStrategy(False, True, args.vae_batch_size, args.skip_cache_check)
    )
    subset = {"image_dir": str(folder), "num_repeats": repeats, "caption_extension": ".txt"}
    sanitizer = config_util.ConfigSanitizer(True, True, args.masked_loss, True)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate({"datasets": [{"subsets": [subset]}]}, args)
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    collate = train_util.collator_class(Value("i", 1), Value("i", 0), group)
    accelerator = train_util.prepare_accelerator(args)
    # All rows are there: no model is asked for any.
    group.new_cache_latents(None, accelerator)
    strategy_base.TextEncoderOutputsCachingStrategy.set_strategy(
        strategy_sdxl.SdxlTextEncoderOutputsCachingStrategy(True, None, False, is_weighted=args.weighted_captions)
    )
    group.new_cache_text_encoder_outputs([None, None], accelerator)
    group.set_current_strategies()
    loader = torch.utils.data.DataLoader(group, batch_size=1, shuffle=True, collate_fn=collate, num_workers=0)
    group.set_max_train_steps(args.max_train_steps)
    return accelerator.prepare(loader)


def read(loader: Iterable[dict[str, Any]]) -> float:
    """Seconds that all batches of an epoch take."""
    began = time.perf_counter()
    for batch in loader:
        shapes = [tuple(tensor.shape[1:]) for tensor in (batch["latents"], *batch["text_encoder_outputs_list"])]
        assert shapes == [(4, SIDE // 8, SIDE // 8), *SHAPES.values()]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
