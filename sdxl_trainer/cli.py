"""The command `sdxl`. Nothing heavy is imported before it is needed; the only place that catches UserError."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_trainer import __version__
from sdxl_trainer.errors import Interrupted, UserError
from sdxl_trainer.sampling.request import SETTINGS

if TYPE_CHECKING:
    from sdxl_trainer.config import Config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml|PICTURES/", help="the run's config file, or a folder of pictures")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="options to change")]
Trigger = Annotated[str | None, typer.Option(help="folder: words that shall call up what is learned")]
PresetName = Annotated[str | None, typer.Option("--preset", help="folder: see sdxl presets; default: lora-character")]
ModelPath = Annotated[
    str | None, typer.Option("--model", help="folder: base model; micro: the package's own, small; default: SDXL base")
]
RunName = Annotated[str | None, typer.Option("--name", help="folder: of runs/NAME.toml and runs/NAME/")]


# What typer raises for a command line that it cannot read; newer versions keep it in a private module.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command; the exit status is 0 done, 2 the user can fix it, 130 or 143 interrupted after saving."""
    sys.exit(guarded(command))


def command() -> int:
    """The command line; what is wrong with it is told like everything else."""
    try:
        return app(prog_name="sdxl", standalone_mode=False) or 0
    except UsageError as error:
        context, message = error.ctx, error.format_message()  # type: ignore[attr-defined]
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message, end="\n" if message else "")  # empty if typer has printed its help already
            return 2
        path = context.command_path if context else "sdxl"
        studio = "; the studio is: sdxl ui" if "'studio'" in message else ""
        raise UserError(message, path, f"see: {path} --help{studio}") from None


def guarded(command: Callable[[], object]) -> int:
    """Run a command and turn what is meant for the user into lines and an exit status."""
    try:
        status = command()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Interrupted as stop:
        print("interrupted; the same command continues", file=sys.stderr)
        return 128 + stop.number
    return status if isinstance(status, int) else 0


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"sdxl-trainer {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    """Fine-tune Stable Diffusion XL."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    trigger: Trigger = None,
    preset: PresetName = None,
    model: ModelPath = None,
    name: RunName = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="refuse an output folder that already holds a run")] = False,
) -> None:
    """Train, or continue: the same command resumes. A folder of pictures is enough to begin."""
    loaded = _load(config, overrides, trigger, preset, model, name)
    from sdxl_trainer.run import Start
    from sdxl_trainer.train import train as run

    run(loaded, Start("new" if fresh else "continue"))


@app.command()
def now(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a run that is at work")],
    wishes: Annotated[
        list[str],
        typer.Argument(metavar="save|sample|pause|continue...", help="a checkpoint, pictures, to hold, to go on"),
    ],
) -> None:
    """Ask a run that goes on for a checkpoint or for its validation pictures, now, or to pause and to continue."""
    from sdxl_trainer import wishes as known

    print("\n".join(known.ask(run, wishes)))


@app.command()
def cache(
    config: ConfigFile,
    overrides: Overrides = None,
    trigger: Trigger = None,
    preset: PresetName = None,
    model: ModelPath = None,
    name: RunName = None,
    verify: Annotated[bool, typer.Option("--verify", help="find damaged files instead of encoding")] = False,
    gc: Annotated[
        bool, typer.Option("--gc", help="delete rows that this config does not need, and drafts an hour old")
    ] = False,
    push: Annotated[bool, typer.Option("--push", help="then copy what cache.mirror lacks there")] = False,
) -> None:
    """Encode everything that is missing, then stop (train does it by itself)."""
    loaded = _load(config, overrides, trigger, preset, model, name)
    from sdxl_trainer import inspect_cache

    inspect_cache.run(loaded, verify=verify, gc=gc, push=push)


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    trigger: Trigger = None,
    preset: PresetName = None,
    model: ModelPath = None,
    name: RunName = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    report: Annotated[bool, typer.Option("--report", help="look at the pictures and write check.html")] = False,
) -> None:
    """Config, data, captions, cache, disk, memory: a report before anything is spent."""
    loaded = _load(config, overrides, trigger, preset, model, name)
    from sdxl_trainer import check as checks

    checks.run(loaded, as_json=as_json, report=report)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="show every value that this one sets")] = None,
) -> None:
    """Starting points for --preset, and what they set."""
    from sdxl_trainer import presets as known

    print(known.shown(name) if name else known.listing(), end="")


def sample(model: str | None, prompt: list[str] | None, lora: list[str] | None, **given: Any) -> None:
    """Pictures from a base or trained model: from text, from a picture, under a mask, with a refiner, in grids."""
    from sdxl_trainer import sample as samples
    from sdxl_trainer.sampling import order, request

    here = {name: given.pop(name) for name in ("prompts", "like", "images", "x", "y", "out", "batch", "offload")}
    told = {
        name: request.value(name, raw, request.COMMAND)
        for name, raw in given.items()
        if name in request.SETTINGS and raw is not None
    }
    told |= {name + "s": tuple(raw) for name, raw in (("lora", lora), ("embedding", given["embedding"])) if raw}
    made = order.made(model, told, prompt or (), here["prompts"], here["like"], here["images"], (here["x"], here["y"]))
    for path in samples.run(made, here["out"], here["batch"], here["offload"]):
        print(path)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its options: every setting of a picture is one."""
    option, several = typer.Option, list[str] | None
    rows: list[tuple[str, Any, Any, Any]] = [
        (
            "model",
            str | None,
            typer.Argument(help="diffusers folder, hub id, .safetensors file, folder of a run, or micro"),
            None,
        ),
        ("prompt", several, option(help="what to draw; may be given several times"), None),
        ("prompts", Path | None, option(help="file of prompts: .txt, .jsonl or .toml"), None),
        ("like", Path | None, option(help="draw as this picture was drawn, where nothing else is said"), None),
        ("lora", several, option(help="adapter FILE or FILE:weight; may be given several times"), None),
        ("embedding", several, option(help="file of new words; may be given several times"), None),
        ("out", Path, option(help="folder for the pictures"), Path("samples")),
        ("images", int, option(min=1, help="pictures per prompt"), 1),
        ("batch", int, option(min=1, help="pictures drawn at once"), 1),
        ("x", str | None, option(help="grid: setting=value,value,... (or model, lora, prompt, replace)"), None),
        ("y", str | None, option(help="grid from top to bottom"), None),
        ("offload", str | None, option(help="save GPU memory: model, or sequential (slow)"), None),
    ]
    for name, setting in SETTINGS.items():
        rows.append((name, str | None, option(help=setting.words, rich_help_panel=setting.group), None))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    made = [inspect.Parameter(n, kind, default=d, annotation=Annotated[t, o]) for n, t, o, d in rows]
    command.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
    return command


app.command()(_with_settings(sample))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="model, adapter, embedding, or another trainer's config")
    ],
    target: Annotated[Path | None, typer.Argument(metavar="DST", help=".safetensors file, folder, or .toml")] = None,
    show: Annotated[bool, typer.Option("--show", help="say what SRC is instead, and what it says of itself")] = False,
    to: Annotated[str | None, typer.Option(help="folder, single, kohya, diffusers, embedding, learned")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default: as it is")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE=0.8 or FILE=UNET,TEXT: merge into SRC; repeat")] = None,
    weight: Annotated[str | None, typer.Option(help="strength of SRC itself, if it is an adapter")] = None,
    extract_from: Annotated[Path | None, typer.Option(help="base: write what SRC learned since as an adapter")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the adapter that is written")] = None,
    energy: Annotated[float | None, typer.Option(help="least ranks that keep this share of the change")] = None,
    base: Annotated[Path | None, typer.Option(help="model of SRC's shape, if not full-size SDXL")] = None,
    token: Annotated[str | None, typer.Option(help="word of an embedding in diffusers' files")] = None,
    entry: Annotated[list[str] | None, typer.Option("--set", help="entry of the header: name=value; repeat")] = None,
    metadata: Annotated[str | None, typer.Option(help="full, minimal or none: what the header keeps")] = None,
    preview: Annotated[Path | None, typer.Option(help="picture to show an adapter by")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace DST")] = False,
    trainer: Annotated[
        str | None,
        typer.Option("--from", help="config: kohya, kohya-gui, diffusers, onetrainer, simpletuner, ai-toolkit"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="config: the file that names its pictures")] = None,
) -> None:
    """Between formats: models, LoRA and its kin, embeddings; merge, extract, resize. Configs of other trainers."""
    from sdxl_trainer.convert import request, run

    given: dict[str, Any] = {
        "to": to,
        "dtype": dtype,
        "loras": lora,
        "weight": weight,
        "extract_from": extract_from,
        "rank": rank,
    }
    given |= {"energy": energy, "base": base, "token": token, "entries": entry, "metadata": metadata}
    given |= {"preview": preview, "overwrite": overwrite}
    config = target if target is not None and target.suffix == ".toml" and not show else None
    for flag, value in (("--from", trainer), ("--data", data)):
        if value is not None and not config:
            raise UserError(f"{flag} is for configs of other trainers", "sdxl convert", "name a .toml file as DST")
    if config:
        from sdxl_trainer import arrivals

        request.checked(source=source, target=target, **given).only("a config")
        print("\n".join(arrivals.convert(source, config, trainer, data, overwrite)))
    elif show:
        from sdxl_trainer.convert import show as shows

        request.checked(source=source, target=target or source, **given).only("--show")
        shows.show(source)
    elif target is None:
        raise UserError("no DST is given", "sdxl convert", "name what to write, or use --show to look at SRC")
    else:
        for line in run(request.checked(source=source, target=target, **given)):
            print(line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="output folders of one or several runs")],
    out: Annotated[Path | None, typer.Option(help="page about several runs (default: compare.html)")] = None,
) -> None:
    """One self-contained HTML page about a run, or about several side by side."""
    from sdxl_trainer import report as reports

    if len(runs) > 1:
        from sdxl_trainer.report import compare

        print(compare.write(runs, out or Path("compare.html")))
    elif out is not None:
        raise UserError("--out with one run", "sdxl report", "its page is report.html in its folder; remove --out")
    else:
        print(reports.write(runs[0]))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a finished run")],
    name: Annotated[str | None, typer.Option("--id", help="you/name; default: hub.id, or the folder's name")] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="of a new repository")] = None,
    look: Annotated[bool, typer.Option("--look", help="say what would be done, and do nothing")] = False,
) -> None:
    """Upload a run's result with its card to the Hugging Face hub, after saying what that means."""
    from sdxl_trainer import publish

    print("\n".join(publish.planned(run, name, private).told()), flush=True)
    if not look:
        print(f"pushed to {publish.push(run, name, private)}")


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(help="where configs and runs are kept")] = Path(),
    port: Annotated[int, typer.Option(min=0, max=65535, help="port of this machine; 0: any that is free")] = 7860,
    show: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the browser")] = True,
) -> None:
    """The studio: a page on this machine that does the whole job."""
    from sdxl_trainer import studio

    studio.serve(folder, port, show)


@app.command()
def schema(
    table: Annotated[bool, typer.Option("--table", help="as a table for people instead")] = False,
    commands: Annotated[bool, typer.Option("--commands", help="the commands and their options instead")] = False,
) -> None:
    """Print the JSON Schema of the config file, for editors."""
    from sdxl_trainer import configfile, reference

    if commands:
        print(reference.commands(typer.main.get_command(app)), end="")
    else:
        print(configfile.options_table() if table else configfile.schema(), end="")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the demo")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 800,
) -> None:
    """The embedded default: micro-SDXL learns a shape that it has never seen."""
    from sdxl_trainer import demo as demos

    demos.run(out, steps)


def _load(
    path: Path,
    overrides: list[str] | None,
    trigger: str | None = None,
    preset: str | None = None,
    model: str | None = None,
    name: str | None = None,
) -> "Config":
    from sdxl_trainer import configfile, from_folder

    wish = from_folder.Wish(trigger, preset, model, name)
    if path.is_dir():
        return from_folder.load(path, wish, overrides or ())
    wish.refuse_any(path)
    return configfile.load(path, overrides or ())
