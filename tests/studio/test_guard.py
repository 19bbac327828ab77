"""Who may talk to the studio, and that nobody gets out of the folders that were chosen."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdxl_trainer.studio.workspace import Workspace
from tests.studio.conftest import ADDRESS, PORT, TOKEN

STRANGER = {"authorization": ""}


def test_without_the_token_nothing_is_told(client: TestClient) -> None:
    for path in ("/", "/static/main.js", "/api/begin", "/api/events", "/api/thumbnail?name=a", "/nowhere"):
        assert client.get(path, headers=STRANGER).status_code == 401
    assert client.get("/", params={"token": "x" * 43}, headers=STRANGER, follow_redirects=False).status_code == 401
    assert client.get("/", headers={"authorization": b"Bearer \xff"}).status_code == 401


def test_the_token_in_the_address_becomes_a_cookie_that_scripts_and_other_sites_do_not_get(client: TestClient) -> None:
    answer = client.get("/", params={"token": TOKEN}, headers=STRANGER, follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"studio-{PORT}=")
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/", headers=STRANGER).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1:80", "127.0.0.1", "localhost:7861", ""])
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    """A name that an attacker makes to point here (DNS rebinding) is not the studio's."""
    assert client.get("/api/begin", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:80", "https://127.0.0.1:7860"])
def test_other_origins_are_refused(client: TestClient, origin: str) -> None:
    assert client.post("/api/train", json={}, headers={"origin": origin}).status_code == 403
    assert client.post("/api/browse", headers={"origin": ADDRESS}).status_code == 405


def test_changes_need_a_header_that_forms_of_other_pages_cannot_send(client: TestClient) -> None:
    answer = client.post("/api/choose", json={"path": "/"}, headers={"x-studio": ""})
    assert answer.status_code == 200 or answer.status_code == 400
    del client.headers["x-studio"]
    assert client.post("/api/choose", json={"path": "/"}).status_code == 403


def test_every_answer_lets_the_page_load_only_what_is_its_own(client: TestClient) -> None:
    for path in ("/", "/static/studio.css", "/api/begin", "/nowhere"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "script-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"


def test_bodies_that_are_too_large_are_refused(client: TestClient) -> None:
    assert client.post("/api/caption", content=b"x" * (9 << 20)).status_code == 413
    parts = (b"x" * (1 << 20) for _ in range(9))  # without a length
    assert client.post("/api/caption", content=parts).status_code == 413


@pytest.mark.parametrize("body", [b"", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"name": '])
def test_what_is_not_a_json_object_is_told(client: TestClient, body: bytes) -> None:
    assert client.post("/api/start", content=body).status_code == 400


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a/../../secret.png",
        "a\0b.png",
        "out.png",
        "x" * 5000,
        "out/s.png",
    ],
)
def test_no_name_leads_out_of_a_chosen_folder(client: TestClient, opened: str, name: str) -> None:
    outside = Path(opened).parent / "secret.png"
    outside.write_bytes((Path(opened) / "img0.png").read_bytes())
    (Path(opened) / "out.png").symlink_to(outside)
    (Path(opened) / "out").symlink_to(outside.parent)
    assert client.get("/api/thumbnail", params={"folder": opened, "name": name}).status_code == 400


def test_only_chosen_folders_are_shown_and_changed(client: TestClient, photos: Path) -> None:
    sent = {"folder": str(photos), "captions": {"img0.png": "x"}, "before": {}}
    assert client.get("/api/thumbnail", params={"folder": str(photos), "name": "img0.png"}).status_code == 400
    assert client.get("/api/pictures", params={"folder": str(photos)}).status_code == 400
    assert client.post("/api/caption", json=sent).status_code == 400
    assert (photos / "img0.txt").read_text(encoding="utf-8") == "a boat, tag0\n"


NAMES = ["../x", "a/b", "..", "", "con", "COM1.txt", ".hidden", "x" * 81, "a\nb", "a\0b", "-x", "a.", "a b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_runs_are_one_part_of_a_path(client: TestClient, opened: str, name: object) -> None:
    before = sorted(str(p) for p in Path(opened).parent.rglob("*"))
    answer = client.post("/api/start", json={"name": name, "folder": opened, "preset": "lora-style"})
    assert answer.status_code == 400
    assert sorted(str(p) for p in Path(opened).parent.rglob("*")) == before
    assert client.get("/api/run-file", params={"run": name, "file": "../../photos/img0.png"}).status_code == 400


def test_uploads_stay_in_their_folder(client: TestClient, tmp_path: Path) -> None:
    def upload(name: str, content: bytes, folder: str = "new") -> Any:
        return client.put("/api/upload", params={"folder": folder, "name": name}, content=content)

    bad = ["../../escaped.png", "/rooted.png", "deep/../up.txt", "bad.sh", ".hidden.png", "__MACOSX/x.png", "a/c:d.png"]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        for name in ("sub/good.png", *bad):
            made.writestr(name, "x")
    assert upload("set.zip", archive.getvalue()).json()["left_out"] == bad
    folder = tmp_path / "home" / "pictures" / "new"
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["sub/good.png"]
    assert upload("../../a.png", b"x").status_code == 200
    assert (folder / "a.png").read_bytes() == b"x"
    assert upload("a.png", b"other").status_code == 400, "nothing is replaced"
    assert upload("a.sh", b"x").status_code == 400
    assert upload(".bashrc", b"x").status_code == 400
    assert upload("b.png", b"x", folder="../up").status_code == 400
    assert upload("broken.zip", b"no archive").status_code == 400
    assert [p for p in tmp_path.rglob("*.png") if not p.is_relative_to(folder)] == []
    assert not list(folder.rglob("*.tmp"))


def test_a_report_of_a_run_is_nobody_in_the_browser(client: TestClient, tmp_path: Path) -> None:
    run = tmp_path / "home" / "runs" / "a"
    run.mkdir(parents=True)
    (run / "report.html").write_text("<script>alert(1)</script>", encoding="utf-8")
    answer = client.get("/api/run-file", params={"run": "a", "file": "report.html"})
    assert answer.headers["content-security-policy"].startswith("sandbox allow-scripts;")
    (run / "config.toml").write_text("", encoding="utf-8")
    assert client.get("/api/run-file", params={"run": "a", "file": "config.toml"}).status_code == 400


def test_the_token_is_long_kept_and_for_its_owner_alone(tmp_path: Path) -> None:
    token = Workspace(tmp_path).token()
    assert len(token) >= 43
    assert Workspace(tmp_path).token() == token
    assert (tmp_path / "runs" / ".studio" / "token").stat().st_mode & 0o777 == 0o600
