"""`sdxl cache`: fill, verify, and clean the cache of a config."""

from pathlib import Path

from sdxl_trainer import base as bases
from sdxl_trainer import class_pictures, distributed, setup
from sdxl_trainer.config import Config
from sdxl_trainer.data import cache, holes, masks, prepare
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.log import Console


def run(config: Config, *, verify: bool, gc: bool) -> None:
    """Encode what is missing; or look for damage; or delete what this config does not need."""
    folder = prepare.cache_folder(config)
    if verify and gc:
        raise UserError("--verify and --gc are two jobs", "command line", "give one of them, then the other")
    if verify:
        _verify(folder)
        return
    notes: list[str] = []
    precision = setup.computing(config, notes)
    accelerator = distributed.make(config, precision)
    console = Console(accelerator.is_main_process)
    for line in notes:
        console.say(line)
    with accelerator.main_process_first():
        base = bases.resolve(config.model, folder)
        orders = class_pictures.missing(config, base, open_memo(folder))
    if orders:
        setup.draw_class_pictures(config, base, orders, precision, accelerator, console)
    with accelerator.main_process_first():
        stock = prepare.take_stock(config, base, precision)
    if gc:
        freed = _collect(stock) + cache.remove_drafts(folder)
        console.say(f"freed {freed / 1e6:.1f} MB in {folder}")
        return
    new = len(stock.missing_latents()), len(stock.missing_texts())
    setup.fill(config, base, stock, accelerator, console)
    size = (stock.latents.bytes() + stock.texts.bytes()) / 1e6
    console.say(f"encoded {new[0]} latents and {new[1]} captions; {folder} holds {size:.1f} MB")


def _verify(folder: Path) -> None:
    bad = [path for kind in ("latents", "texts") for path in cache.damaged(folder / kind)]
    count = sum(1 for kind in ("latents", "texts") for _ in (folder / kind).glob("*.safetensors"))
    if count == 0:
        raise UserError("there is no cache to verify", str(folder), "fill it first: sdxl cache CONFIG.toml")
    if bad:
        listed = shortened(str(path) for path in bad)
        raise UserError(f"{len(bad)} of {count} cache files are damaged", listed, "delete them: they are encoded anew")
    Console().say(f"{count} cache files in {folder}: every byte is as it was written")


def _collect(stock: prepare.Stock) -> int:
    latents = {stock.keys.latent(p, g) for p in stock.cached for g in p.geometries}
    latents |= masks.rows(stock.cached).keys()
    if stock.holes:
        latents |= holes.rows(stock.keys, stock.cached, stock.holes)
    texts = {f"{stock.keys.text_row(p)}.{kind}" for p in stock.prompts for kind in ("states", "pooled")}
    return sum(cache.collect_garbage(s.folder, n) for s, n in ((stock.latents, latents), (stock.texts, texts)))
