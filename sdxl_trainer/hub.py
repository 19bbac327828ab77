"""A run's result on the Hugging Face hub: what an upload would do, and the upload. The token is never shown."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sdxl_trainer import private
from sdxl_trainer.config import Config, Hub
from sdxl_trainer.errors import UserError, plural, shortened

# What stays here: states to resume from, caches, logs, unfinished files (and the old names of such folders), and the
# page of the check, which shows the pictures that were trained on.
LEFT_OUT = (
    "checkpoint-*",
    "cache/*",
    "logs/*",
    "wandb/*",
    "step_*",
    "epoch_*",
    "*.tmp*",
    ".lock",
    ".pause",
    "check.html",
)


@dataclass(frozen=True)
class Plan:
    """What an upload would do: to which repository, public or private if it is a new one, and which files with their
    bytes. `token`: whether this machine has one."""

    repository: str
    private: bool
    files: tuple[tuple[str, int], ...]
    token: bool

    def told(self) -> list[str]:
        """The plan in words."""
        where = self.repository if "/" in self.repository else f"{self.repository}, in the account of the token"
        seen = "nobody else sees it" if self.private else "everybody can see it, with its prompts and pictures"
        total = sum(size for _, size in self.files) / 1e6
        names = sorted({name.split("/")[0] + "/" * ("/" in name) for name, _ in self.files})
        token = "this machine has one" if self.token else "none on this machine: hf auth login, or set HF_TOKEN"
        return [
            f"to: {where}",
            f"if it is new: {'private' if self.private else 'public'}, {seen}; one that is there stays as it is",
            f"what: {plural(len(self.files), 'file')}, {total:.1f} MB: {shortened(names, 20)}",
            "not: checkpoints, caches, logs, check.html, which shows your pictures; of paths their last name alone",
            f"token: {token}",
        ]


def left_out(config: Config, output: Path) -> list[str]:
    """What of a run's folder serves only to continue it, where its config says so."""
    cached = Path(config.cache.path or output / "cache").expanduser()
    found = [f"{config.log.dir}/*"]
    return found + ([f"{cached.relative_to(output)}/*"] if cached.is_relative_to(output) else [])


def planned(folder: Path, hub: Hub, left_out: Sequence[str] = ()) -> Plan:
    """What `push` would do. It asks nobody."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    ignored = [*LEFT_OUT, *left_out, *DEFAULT_IGNORE_PATTERNS]
    kept, told = filter_repo_objects(names, ignore_patterns=ignored), private.told(folder)
    sizes = tuple((name, _size(folder / name, told(folder / name))) for name in kept)
    return Plan(hub.id or folder.resolve().name, hub.private, sizes, bool(get_token()))


def _size(path: Path, told: bytes | None) -> int:
    return path.stat().st_size if told is None else len(told)


def refuse_name(output_dir: Path, hub: Hub) -> None:
    """Refuse a name that no repository can have. It asks nobody."""
    if not hub.push:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = hub.id or output_dir.resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise _explained(error, name, "nothing has been trained yet") from None


def repository(output_dir: Path, hub: Hub) -> str:
    """Make sure, before anything is spent, that the result can be uploaded; the full name of its repository."""
    return _repository(output_dir, hub, "nothing has been trained yet")


def push(
    folder: Path, hub: Hub, left_out: Sequence[str] = (), card: Callable[[str], str | None] = lambda repo_id: None
) -> str:
    """Upload a run's result, without `left_out` and what only serves to continue it. The address of its page.

    `card` gives the README.md for a repository of this full name; None: the one in the folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    name = hub.id or folder.resolve().name
    chosen = shlex.join(["--id", name, *(["--private"] if hub.private else [])])
    later = f"the result is safe in {folder}; later: sdxl push {shlex.quote(str(folder))} {chosen}"
    repo_id = _repository(folder, hub, later)
    try:
        with TemporaryDirectory() as staged:
            _stage(folder, Path(staged), [name for name, _ in planned(folder, hub, left_out).files], card(repo_id))
            HfApi().upload_folder(repo_id=repo_id, folder_path=staged, commit_message="End of training")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explained(error, repo_id, later) from None
    return f"{HfApi().endpoint}/{repo_id}"


def _stage(folder: Path, staged: Path, names: Sequence[str], card: str | None) -> None:
    """Links to the files, or what others are told of them where that is less; the card, if one is given."""
    told = private.told(folder)
    for name in names:
        target, source = staged / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "README.md" and card is not None:
            source = target
            target.write_text(card, encoding="utf-8")
        content = told(source)
        if content is not None:
            target.write_bytes(content)
        elif source != target:
            target.symlink_to(source.absolute())


def _repository(folder: Path, hub: Hub, safe: str) -> str:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError

    name = hub.id or folder.resolve().name
    if not get_token():
        raise UserError(f"no token to push '{name}' to the hub", "hub.push", f"hf auth login, or set HF_TOKEN; {safe}")
    try:
        return HfApi().create_repo(name, private=hub.private or None, exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError) as error:
        raise _explained(error, name, safe) from None


def _explained(error: Exception, name: str, safe: str) -> UserError:
    """The error of a library as one for the user, who wants to know first that the result is not lost."""
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    known = {
        401: ("the hub does not accept this token", "hf auth login with a token that may write"),
        403: (f"this token may not write to '{name}'", "use a token that may, or another hub.id"),
        404: (f"the hub has no repository '{name}', or hides it from this token", "use a token that may write to it"),
    }
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if status in known:
        what, fix = known[status]
    elif isinstance(cause, OfflineModeIsEnabled):
        what, fix = "the hub is switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE"
    elif isinstance(cause, HFValidationError):
        what = f"'{name}' cannot be the name of a repository"
        fix = "set hub.id to 'you/name': letters, digits, and single - _ . between them, at most 96"
    elif isinstance(cause, HTTPError | ConnectionError) and status is None:
        what, fix = f"the hub cannot be reached ({reason})", "check the network"
    else:
        what, fix = f"the hub refused '{name}' ({status or reason})", "try again"
    return UserError(what, "hub.id" if isinstance(cause, HFValidationError) else "hub.push", f"{fix}; {safe}")
