"""The model card, and uploads to a stand-in for the hub on this machine."""

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image

from sdxl_trainer import configfile, lock, publish
from sdxl_trainer.config import Config, Hub
from sdxl_trainer.errors import UserError
from sdxl_trainer.hub import planned, push, repository
from sdxl_trainer.publish import card
from sdxl_trainer.train import train
from tests.compat import hub as standin

ROOT = Path(__file__).parents[1]

TOKEN = "hf_standin_secret"
# huggingface_hub uploads LFS files in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "output_dir": "run",
        "model": {"path": "stabilityai/stable-diffusion-xl-base-1.0"},
        "data": [{"path": "lambdalabs/naruto-blip-captions", "flip": True, "caption_dropout": 0.1}],
        "train": {"steps": 250, "batch_size": 4, "precision": "bf16"},
    }
    return Config.model_validate_json(json.dumps({**tree, **changes}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run: two steps with pictures, a checkpoint, logs and a cache."""
    folder = tmp_path / "my-model"
    rows = [
        {"step": step, "file": f"step-{step:06}/0-{i}.png", "prompt": prompt, "seed": 7 + i, "weights": "raw"}
        for step in (100, 250)
        for i, prompt in enumerate(["a cat | two [dogs]", "a cat | two [dogs]", "a *star*"])
    ]
    for row in rows:
        path = folder / "samples" / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    (folder / "samples" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "manifest.json").write_text(
        json.dumps({"command": ["sdxl", "train", f"{Path.home()}/my run.toml"], "data": {"pictures": 1221}})
    )
    for name in [
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "checkpoint-250/unet/diffusion_pytorch_model.safetensors",
        "cache/latents.safetensors",
        "logs/text2image/events.out",
        "wandb/run.log",
        "step_1/a.png",
        ".manifest.json.12.tmp",
        "unet/.part.12.tmp",
        "tensorboard-logs/events.out",
        "check.html",
    ]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter(run_dir: Path) -> None:
    text = card(run_dir, config())
    data = front_matter(text)
    assert ModelCard(text).data.license == "openrail++"
    assert data["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert data["base_model_relation"] == "finetune"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert data["datasets"] == ["lambdalabs/naruto-blip-captions"]
    assert {"text-to-image", "diffusers", "diffusers-training", "stable-diffusion-xl"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))
    assert data["widget"][0] == {"text": "a cat | two [dogs]", "output": {"url": "samples/step-000250/0-0.png"}}
    assert len(data["widget"]) == 3


def test_body(run_dir: Path) -> None:
    text = card(run_dir, config())
    assert "# my-model" in text
    assert "1,221 pictures of [lambdalabs/naruto-blip-captions](https://huggingface.co/datasets/" in text
    assert "| `train.steps` | 250 |" in text
    assert "| `train.precision` | bf16 |" in text
    assert "train.epochs" not in text
    assert "mirrored half of the time, 0.1 of the captions left out" in text
    assert "sdxl train '~/my run.toml'" in text
    assert str(Path.home()) not in text
    assert 'DiffusionPipeline.from_pretrained("my-model"' in text
    assert "samples/step-000100" not in text


def test_pictures_are_where_the_card_looks(run_dir: Path) -> None:
    text = card(run_dir, config())
    urls = [entry["output"]["url"] for entry in front_matter(text)["widget"]]
    assert all((run_dir / url).is_file() and f"]({url})" in text for url in urls)
    assert "| ![seed 7](samples/step-000250/0-0.png) | ![seed 8](samples/step-000250/0-1.png) |" in text
    assert "*a cat \\| two \\[dogs\\]*" in text
    assert "*a \\*star\\**" in text


def test_averaged_pictures_are_preferred(run_dir: Path) -> None:
    rows = [{"step": 250, "file": f"{w}.png", "prompt": "p", "seed": 1, "weights": w} for w in ("raw", "ema")]
    (run_dir / "samples" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = card(run_dir, config(ema={"enabled": True}))
    assert [entry["output"]["url"] for entry in front_matter(text)["widget"]] == ["samples/ema.png"]
    assert "`unet_raw/`" in text


CLASS = {"path": "dogs", "caption": "a dog", "caption_only": True, "regularisation": True}
SUBJECT = {"path": "rex", "caption": "a photo of sks dog", "caption_only": True}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data": [CLASS, SUBJECT]}, "a photo of sks dog"),
        ({"data": [CLASS, {**SUBJECT, "trigger": "sks"}]}, "sks"),
        ({"data": [{"path": "rex", "trigger": "sks"}], "export": {"trigger": "sks dog"}}, "sks dog"),
        ({"data": [{"path": "rex", "caption": "a dog"}]}, None),
        ({"data": [{**SUBJECT, "caption": "a <s0> dog"}], "token": [{"name": "<s0>"}]}, None),
    ],
    ids=["caption", "trigger", "given", "pictures without captions", "new word"],
)
def test_the_card_says_which_words_call_it_up(run_dir: Path, more: dict[str, Any], words: str | None) -> None:
    text = card(run_dir, config(adapter={"rank": 4}, **more))
    assert front_matter(text).get("instance_prompt") == words
    assert ("calls up what was learned" in text) == (words is not None)
    assert words is None or f"`{words}` in a prompt" in text


def test_a_run_without_pictures_or_records(tmp_path: Path) -> None:
    text = card(tmp_path, config(), repo_id="me/mine")
    assert "widget" not in front_matter(text)
    assert "## Samples" not in text
    assert 'from_pretrained("me/mine"' in text


LICENCES: list[tuple[str, dict[str, str]]] = [
    ("license: openrail++", {"license": "openrail++"}),
    (
        "license: other\nlicense_name: faipl-1.0-sd\nlicense_link: https://freedevproject.org/faipl-1.0-sd/",
        {
            "license": "other",
            "license_name": "faipl-1.0-sd",
            "license_link": "https://freedevproject.org/faipl-1.0-sd/",
        },
    ),
    ("tags: [a]", {}),
    ("license: [unclosed", {}),
]


@pytest.mark.parametrize(("head", "expected"), LICENCES)
def test_the_licence_is_that_of_a_local_base(tmp_path: Path, head: str, expected: dict[str, str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{head}\n---\n# Base\n")
    text = card(tmp_path, config(model={"path": str(base)}))
    data = front_matter(text)
    assert {key: data[key] for key in data if key.startswith("license")} == expected
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "fine-tuned from `base`" in text
    assert "## Licence" in text
    if "license_link" in expected:
        assert f"[faipl-1.0-sd]({expected['license_link']})" in text


@pytest.mark.parametrize("learns", [{}, {"adapter": {"rank": 4}}, {"token": [{"name": "<cat>", "init": "cat"}]}])
def test_local_names_stay_private(tmp_path: Path, learns: dict[str, Any]) -> None:
    (tmp_path / "photos").mkdir()
    places = {"data": [{"path": str(tmp_path / "photos")}], "model": {"path": str(tmp_path / "base")}}
    text = card(tmp_path, config(**places, **learns))
    assert "`photos`" in text
    assert str(tmp_path) not in text
    assert "datasets" not in front_matter(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Hub]:
    with standin.running(TOKEN) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push_uploads_the_result_and_nothing_else(run_dir: Path, hub: standin.Hub) -> None:
    (run_dir / "README.md").write_text(card(run_dir, config()))
    before = files_of(run_dir)
    page = push(run_dir, Hub(push=True), left_out=["tensorboard-logs/*"])
    assert page == f"{hub.url}/me/my-model"
    arrived = hub.repositories["me/my-model"]
    kept = {"README.md", "model_index.json", "manifest.json", "unet/diffusion_pytorch_model.safetensors"}
    pictures = {f"samples/step-{step:06}/0-{i}.png" for step in (100, 250) for i in range(3)}
    assert set(arrived) == kept | pictures | {"samples/samples.jsonl"}
    told = {"manifest.json", "README.md"}  # without where this machine has its files
    assert all(before[name] == data for name, data in arrived.items() if name not in told)
    assert b"sdxl train 'my run.toml'" in arrived["README.md"]
    assert json.loads(arrived["manifest.json"])["command"] == ["sdxl", "train", "my run.toml"]
    assert len(hub.objects) == 2  # the weights, and the one picture that all six are
    assert files_of(run_dir) == before
    assert not any(TOKEN.encode() in data for data in [*before.values(), *arrived.values()])
    assert hub.private == set()


@pytest.mark.parametrize("more", [{}, {"adapter": {"kind": "loha", "rank": 2}}], ids=["whole", "adapter"])
def test_an_upload_does_not_tell_where_things_lie(
    base: Path, pictures: Path, tmp_path: Path, hub: standin.Hub, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Not in config, records, card, page and pictures; what is used of it is still there."""
    hidden = tmp_path / "Jane's secret & <odd>"
    for name, source in (("tiny", base), ("photos", pictures)):
        (hidden / name).parent.mkdir(exist_ok=True)
        shutil.copytree(source, hidden / name)
    monkeypatch.setattr(sys, "argv", ["sdxl", "train", f"{hidden}/a.toml", f"data.0.path={hidden}/photos"])
    tree = {
        "output_dir": str(hidden / "my-run"),
        "model": {"path": str(hidden / "tiny")},
        "data": [{"path": str(hidden / "photos"), "resolution": 64}],
        "cache": {"path": str(hidden / "cache"), "workers": 0},
        "train": {"steps": 1, "batch_size": 2, "checkpoint_every": 0},
        "validation": {"prompts": ["/a red circle/"], "images": 1, "steps": 1},
        "log": {"pictures": True},
        "hub": {"push": True},
    }
    output = train(configfile.validated({**tree, **more}, "test.toml"))
    arrived = hub.repositories["me/my-run"]
    assert arrived.keys() == {name for name, _ in planned(output, Hub(push=True)).files}
    left = {name: content.find(word) for name, content in arrived.items() for word in (b"secret", b"Jane")}
    assert {name: arrived[name][max(0, at - 80) : at + 40] for name, at in left.items() if at >= 0} == {}
    told = configfile.validated(tomllib.loads(arrived["config.toml"].decode()), "config.toml")
    assert (told.output_dir, told.model.path, told.data[0].path, told.cache.path) == (
        "my-run",
        "tiny",
        "photos",
        "cache",
    )
    assert told.validation.prompts == ("/a red circle/",)
    assert json.loads(arrived["manifest.json"])["command"] == ["sdxl", "train", "a.toml", "data.0.path=photos"]
    (drawn,) = (name for name in arrived if name.endswith(".png"))
    with Image.open(io.BytesIO(arrived[drawn])) as one, Image.open(output / drawn) as two:
        assert one.tobytes() == two.tobytes()
        assert json.loads(one.info["sdxl_trainer"])["prompt"] == "/a red circle/"
    assert "secret" in (output / "config.toml").read_text(), "here it stays as it is"


def test_what_an_upload_would_do_is_what_it_does(run_dir: Path, hub: standin.Hub) -> None:
    (run_dir / ".pause").touch()
    plan = planned(run_dir, Hub(push=True), left_out=["tensorboard-logs/*"])
    assert hub.requests == [], "it asks nobody"
    push(run_dir, Hub(push=True), left_out=["tensorboard-logs/*"])
    assert dict(plan.files) == {name: len(data) for name, data in hub.repositories["me/my-model"].items()}
    assert plan.token
    said = "\n".join(plan.told())
    assert "my-model, in the account of the token" in said
    assert "public, everybody can see it" in said
    assert TOKEN not in said


def test_a_finished_run_is_pushed_by_a_command(run_dir: Path, hub: standin.Hub) -> None:
    made = config(output_dir=str(run_dir), cache={"path": str(run_dir / "cache")})

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "sdxl_trainer", "push", str(run_dir), *more]
        return subprocess.run(words, env={**os.environ, **hub.environment()}, capture_output=True, text=True)

    assert "there is no run in this folder" in command().stderr
    (run_dir / "config.toml").write_text(configfile.dumps(made))
    assert "has left no result yet" in command().stderr
    (run_dir / "README.md").write_text(card(run_dir, made))
    looked = command("--id", "me/style", "--private", "--look")
    assert (looked.returncode, hub.requests) == (0, [])
    done = command("--id", "me/style", "--private")
    assert done.stdout.splitlines() == [*looked.stdout.splitlines(), f"pushed to {hub.url}/me/style"]
    assert hub.private == {"me/style"}
    assert b'from_pretrained("me/style"' in hub.repositories["me/style"]["README.md"]
    assert TOKEN not in done.stdout + done.stderr
    (run_dir / "README.md").write_text("my own words")
    publish.push(run_dir, "me/style")
    assert hub.repositories["me/style"]["README.md"] == b"my own words"
    with lock.held(run_dir), pytest.raises(UserError, match="at work"):
        publish.planned(run_dir)


def test_the_card_on_the_hub_names_its_repository_in_full(run_dir: Path, hub: standin.Hub) -> None:
    """The account is known from the token alone; here the folder's own name loads it."""
    (run_dir / "config.toml").write_text(configfile.dumps(config()))
    (run_dir / "README.md").write_text(card(run_dir, config()))
    Image.new("RGB", (8, 8)).save(run_dir / "samples/step-000250/[9]-9.png")  # of a run before, not in samples.jsonl
    before = files_of(run_dir)
    publish.push(run_dir)
    assert sum(name.endswith(".png") for name in hub.repositories["me/my-model"]) == 6
    arrived = hub.repositories["me/my-model"]["README.md"]
    assert b'from_pretrained("me/my-model"' in arrived
    assert b"sdxl train 'my run.toml'" in arrived, "without where this machine has its files"
    assert files_of(run_dir) == before
    publish.push(run_dir, "team/other")
    assert b'from_pretrained("team/other"' in hub.repositories["team/other"]["README.md"]


def test_push_again_and_elsewhere(run_dir: Path, hub: standin.Hub) -> None:
    first = push(run_dir, Hub(push=True, id="team/other", private=True))
    assert push(run_dir, Hub(push=True, id="team/other", private=True)) == first
    assert set(hub.repositories) == {"team/other"} == hub.private


def test_the_environment_decides_in_a_process_of_its_own(run_dir: Path, hub: standin.Hub) -> None:
    code = "import sys; from pathlib import Path; from sdxl_trainer.config import Hub; from sdxl_trainer import hub"
    code += "; hub.push(Path(sys.argv[1]), Hub(push=True)); assert 'torch' not in sys.modules"
    environment = {**os.environ, **hub.environment(), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, env=environment, capture_output=True)
    assert "model_index.json" in hub.repositories["me/my-model"]


def test_the_repository_is_made_before_training(tmp_path: Path, hub: standin.Hub) -> None:
    assert repository(tmp_path / "new", Hub(push=True)) == "me/new"
    assert hub.repositories == {"me/new": {}}


FAILURES: list[tuple[dict[str, int], str]] = [
    ({"/api/repos/create": 401}, "does not accept this token"),
    ({"/api/repos/create": 403, "/api/models/": 403}, "may not write to 'my-model'"),
    ({"/preupload/": 404}, "no repository 'me/my-model'"),
    ({"/lfs/": 403}, "may not write to 'me/my-model'"),
    ({"/commit/": 403}, "may not write to 'me/my-model'"),
    ({"/commit/": 413}, "refused 'me/my-model' (413)"),
]


@pytest.mark.parametrize(("status", "what"), FAILURES)
def test_refusals_say_that_the_result_is_safe(
    run_dir: Path, hub: standin.Hub, status: dict[str, int], what: str
) -> None:
    hub.status.update(status)
    with pytest.raises(UserError) as caught:
        push(run_dir, Hub(push=True))
    assert what in caught.value.what
    assert f"the result is safe in {run_dir}; later: sdxl push" in caught.value.fix
    assert TOKEN not in str(caught.value)


def test_a_wrong_token(run_dir: Path, hub: standin.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="does not accept this token"):
        repository(run_dir, Hub(push=True))


def test_no_token(run_dir: Path, hub: standin.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no token") as caught:
        push(run_dir, Hub(push=True))
    assert "hf auth login" in caught.value.fix
    assert hub.requests == []


def test_no_network(run_dir: Path, hub: standin.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        push(run_dir, Hub(push=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push(run_dir, Hub(push=True))


@pytest.mark.parametrize("name", ["a b", "one/two/three", "--x"])
def test_a_name_that_cannot_be(run_dir: Path, hub: standin.Hub, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a repository") as caught:
        repository(run_dir, Hub(push=True, id=name))
    assert "nothing has been trained yet" in caught.value.fix
