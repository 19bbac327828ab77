"""What users of other programs bring to the studio: kohya's folders and configs, captions in other files."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

FIXTURES = Path(__file__).parents[1] / "fixtures" / "arrivals"


def begin(client: TestClient, **sent: Any) -> Any:
    return client.post("/api/start", json=sent)


def test_a_config_of_kohya_becomes_a_run(client: TestClient, tmp_path: Path) -> None:
    """As `sdxl convert` would write it, into the studio's folder; what became of each option is told."""
    text = (FIXTURES / "kohya-gui.json").read_text(encoding="utf-8")
    made = begin(client, name="mine", file="C:\\me\\my window.json", text=text).json()
    assert made["problem"] is None
    assert made["tree"]["output_dir"] == "runs/mine"
    assert made["toml"].startswith("# From my window.json, a config of kohya_ss, by `sdxl convert`.\n# ")
    fates = [line.split()[0] in {"kept", "off"} for line in made["told"][1:]]
    assert fates == sorted(fates), "what was not simply kept comes first"
    assert "kept, " in made["told"][0]
    assert (tmp_path / "home" / "runs" / "mine.toml").read_text(encoding="utf-8") == made["toml"]
    assert begin(client, name="mine", file="x.json", text=text).status_code == 400, "there is a run of that name"


@pytest.mark.parametrize(
    ("file", "text", "what", "fix"),
    [
        ("x.json", "{", "cannot be read as json", ""),
        ("x.json", '{"a": 1}', "no config that is known here", "--from"),
        ("x.toml", 'output_dir = "x"\n[[data]]\npath = "y"\n[train]\nsteps = 1\n', "ours already", ""),
        (
            "x.toml",
            'pretrained_model_name_or_path = "b"\n',
            "names no pictures",
            "sdxl convert x.toml runs/n.toml --data",
        ),
        ("../../x.exe", "MZ", "", ""),
    ],
)
def test_what_is_no_config_is_refused(client: TestClient, file: str, text: str, what: str, fix: str) -> None:
    answer = begin(client, name="n", file=file, text=text)
    assert answer.status_code == 400
    found = answer.json()
    assert what in found["what"]
    assert fix in found["fix"]
    assert found["where"] == Path(file).name, "and not a temporary file's"


def test_kohya_s_folders_are_judged_by_the_words_in_their_names(client: TestClient, opened: str) -> None:
    folder = Path(opened) / "10_sks boat"
    folder.mkdir()
    for path in Path(opened).glob("img*"):
        path.rename(folder / path.name)
    found = client.get("/api/verdict", params={"folder": opened}).json()
    assert (found["problems"], found["captions"]) == ([], 4)
    assert found["read"] == ["kohya_folders = true: folders named 10_words: seen 10 times an epoch"]


def test_pictures_without_captions_may_get_the_words_of_the_settings(client: TestClient, opened: str) -> None:
    found = client.get("/api/verdict", params={"folder": opened}).json()
    assert "under Settings" in found["problems"][0]["fix"]
    assert found["read"] == []


def test_captions_in_json_are_shown_and_changed_in_text_files(client: TestClient, opened: str) -> None:
    (Path(opened) / "img3.json").write_text(json.dumps({"caption": "a ship"}), encoding="utf-8")
    pictures = client.get("/api/pictures", params={"folder": opened}).json()["pictures"]
    assert (pictures[3]["caption"], pictures[3]["readonly"]) == ("a ship", None)
    sent = {"folder": opened, "captions": {"img3.png": "two ships"}, "before": {"img3.png": "a ship"}}
    assert client.post("/api/caption", json=sent).status_code == 200
    assert json.loads((Path(opened) / "img3.json").read_text()) == {"caption": "a ship"}
    assert (Path(opened) / "img3.txt").read_text() == "two ships\n"
    pictures = client.get("/api/pictures", params={"folder": opened}).json()["pictures"]
    assert pictures[3]["caption"] == "two ships"
