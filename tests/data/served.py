"""A web server for the tests: files, and parts of them if it knows ranges; no lists of folders."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Ranges(http.server.SimpleHTTPRequestHandler):
    known = True

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def _answer(self, whole: bool) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not path.is_file():
            self.send_error(403 if path.is_dir() else 404)
            return
        content, status = path.read_bytes(), 200
        if asked and self.known:
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Whole(Ranges):
    known = False


@contextmanager
def serving(folder: Path, ranges: bool = True) -> Iterator[str]:
    """The address of a folder while it is served."""
    handler = functools.partial(Ranges if ranges else Whole, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
