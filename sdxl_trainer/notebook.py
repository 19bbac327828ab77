"""For notebooks: `from sdxl_trainer import notebook as sdxl`. The commands as functions whose results show themselves.

Nothing heavy is imported before it is needed. What the user can mend is raised as UserError, shown as its three lines.
"""

import copy
import html
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer.errors import Interrupted, UserError, closest

if TYPE_CHECKING:
    from PIL.Image import Image

    from sdxl_trainer.config import Config


@dataclass(frozen=True)
class Page:
    """A page that was written, a run's report or that of a check; a notebook shows it in the cell."""

    path: Path

    def _repr_html_(self) -> str:
        # A frame of its own: the page's style and script stay with it, and its policy lets nothing else load.
        text = html.escape(self.path.read_text(encoding="utf-8"))
        style = "width: 100%; height: 900px; border: 0"
        return f'<iframe srcdoc="{text}" sandbox="allow-scripts" style="{style}" title="{self.path.name}"></iframe>'


@dataclass(frozen=True)
class Run:
    """A run in its folder. A notebook shows its report, as far as it has come."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One row for each optimizer step."""
        from sdxl_trainer.log import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    def report(self) -> Page:
        """The run's page, written anew."""
        from sdxl_trainer import report

        return Page(report.write(self.folder))

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


class Pictures(list["Image"]):
    """Pictures, as a list; a notebook shows them in a row."""

    def _repr_html_(self) -> str:
        from sdxl_trainer.data.images import data_url

        style = "max-width: 256px; margin: 4px"
        return "".join(f'<img src="{data_url(image, "PNG")}" style="{style}">' for image in self)


def load(config: str | Path | Mapping[str, Any], *overrides: str) -> "Config":
    """A config from a TOML file with `section.key=value` overrides, or from plain data of the same form."""
    from sdxl_trainer import configfile

    if isinstance(config, Mapping):
        tree = copy.deepcopy(dict(config))
        for text in overrides:
            configfile.override(tree, text)
        return configfile.validated(tree, "the config")
    return configfile.load(Path(config), overrides)


def check(config: "Config") -> Page:
    """What a run will do and cost, and what is wrong with its data."""
    from sdxl_trainer import check as checks

    checks.run(config, report=True)
    return Page(Path(config.output_dir).expanduser() / "check.html")


def train(config: "Config") -> Run:
    """Train, or continue. Interrupting the kernel saves a checkpoint and gives what there is."""
    from sdxl_trainer.train import train as run

    try:
        return Run(run(config))
    except Interrupted:
        print("interrupted; the same call continues")
        return Run(Path(config.output_dir).expanduser())


def sample(
    model: str | Path | Run,
    prompts: str | Sequence[str],
    *,
    out: str | Path | None = None,
    images: int = 1,
    batch: int = 1,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    **settings: Any,
) -> Pictures:
    """Pictures by a model on disk or on the hub. `settings` are those of `sdxl sample --help`, by their names with `_`;
    without `out` the files are kept in a temporary folder until the pictures are read."""
    from PIL import Image

    from sdxl_trainer import sample as samples
    from sdxl_trainer.sampling import order, request

    for name in settings.keys() - request.SETTINGS.keys():
        raise UserError(f"there is no setting '{name}'", "sample", closest(name, request.SETTINGS))
    told = {name: request.value(name, value, "sample") for name, value in settings.items() if value is not None}
    told |= {name: tuple(values) for name, values in (("loras", loras), ("embeddings", embeddings)) if values}
    wanted = [prompts] if isinstance(prompts, str) else list(prompts)
    name = str(model.folder if isinstance(model, Run) else model)
    made = order.made(name, told, wanted, None, None, images, (None, None))
    with tempfile.TemporaryDirectory() as temporary:
        found = Pictures()
        for path in samples.run(made, Path(out or temporary), batch, None):
            with Image.open(path) as image:
                found.append(image.copy())
    return found
