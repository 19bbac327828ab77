"""`sdxl cache`: fill, verify, and clean the cache of a config."""

from pathlib import Path

from sdxl_trainer import base as bases
from sdxl_trainer import class_pictures, distributed, setup
from sdxl_trainer.config import Config
from sdxl_trainer.data import holes, masks, mirrored, prepare, upkeep
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.log import Console
from sdxl_trainer.threads import keep_freed_memory


def run(config: Config, *, verify: bool, gc: bool, push: bool = False) -> None:
    """Encode what is missing, and copy it to the mirror if wanted; or look for damage; or delete what this config does
    not need."""
    folder, mirror = prepare.cache_folder(config), config.cache.mirror
    jobs = [name for name, wanted in (("--verify", verify), ("--gc", gc), ("--push", push)) if wanted]
    if len(jobs) > 1:
        raise UserError(f"{' and '.join(jobs)} are two jobs", "command line", "give one of them, then the other")
    if verify:
        _verify(folder, mirror)
        return
    if push and mirror is None:
        raise UserError("--push without cache.mirror", "command line", "add cache.mirror=s3://bucket/cache")
    if push and mirror and not mirrored.known(folder, mirror):
        config = config.model_copy(update={"cache": config.cache.model_copy(update={"mirror": None})})
    notes: list[str] = []
    precision = setup.computing(config, notes)
    accelerator = distributed.make(config, precision)
    console = Console(accelerator.is_main_process)
    for line in notes:
        console.say(line)
    with accelerator.main_process_first():
        memo = open_memo(folder)
        base = bases.resolve(config.model, folder, memo)
        orders = class_pictures.missing(config, base, memo)
    if orders:
        setup.draw_class_pictures(config, base, orders, precision, accelerator, console)
    with accelerator.main_process_first():
        stock = prepare.take_stock(config, base, precision)
    if gc:
        freed = _collect(stock) + upkeep.remove_drafts(folder)
        console.say(f"freed {freed / 1e6:.1f} MB in {folder}")
        return
    new = len(stock.missing_latents()), len(stock.missing_texts())
    keep_freed_memory()
    setup.fill(config, base, stock, accelerator, console)
    size = (stock.latents.bytes() + stock.texts.bytes()) / 1e6
    console.say(f"encoded {plural(new[0], 'latent')} and {plural(new[1], 'caption')}; {folder} holds {size:.1f} MB")
    if push and mirror and accelerator.is_main_process:
        count, sent = mirrored.push(folder, mirror, stock.memo, console.progress)
        console.say(
            f"copied {plural(count, 'file')} ({sent / 1e6:.1f} MB) to {mirror}, which holds {_held(folder, mirror)}"
        )


def _held(folder: Path, mirror: str) -> str:
    rows, shards = mirrored.size(mirrored.open_stores(folder, mirror))
    return f"{plural(rows, 'row')} in {plural(shards, 'file')}"


def _verify(folder: Path, mirror: str | None) -> None:
    bad = [str(path) for kind in mirrored.KINDS for path in upkeep.damaged(folder / kind)]
    count = sum(1 for kind in mirrored.KINDS for _ in (folder / kind).glob("*.safetensors"))
    console, where = Console(), str(folder)
    if mirror is not None:
        far, spoiled = mirrored.damaged(folder, mirror, console.progress)
        count, bad, where = count + far, bad + spoiled, f"{folder} and {mirror}"
    if count == 0:
        raise UserError("there is no cache to verify", where, "fill it first: sdxl cache CONFIG.toml")
    if bad:
        fix = "delete them: they are encoded anew" + (", and --push copies them again" if mirror else "")
        raise UserError(f"{len(bad)} of {count} cache files are damaged", shortened(bad), fix)
    console.say(f"{count} cache files in {where}: every byte is as it was written")


def _collect(stock: prepare.Stock) -> int:
    latents = {stock.keys.latent(p, g) for p in stock.cached for g in p.geometries}
    latents |= masks.rows(stock.cached).keys()
    if stock.holes:
        latents |= holes.rows(stock.keys, stock.cached, stock.holes)
    texts = {f"{stock.keys.text_row(p)}.{kind}" for p in stock.prompts for kind in ("states", "pooled")}
    return sum(upkeep.collect_garbage(s.folder, n) for s, n in ((stock.latents, latents), (stock.texts, texts)))
