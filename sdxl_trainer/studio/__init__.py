"""`sdxl ui`: a page on this machine that does the whole job. It runs the same commands that a terminal would."""

import socket
import webbrowser
from pathlib import Path

from sdxl_trainer.errors import UserError

HOST = "127.0.0.1"


def serve(folder: Path, port: int, show: bool) -> None:
    """Serve the studio of a folder until Ctrl-C; trainings go on. UserError if the port is taken."""
    try:
        import uvicorn

        from sdxl_trainer.studio import app
    except ModuleNotFoundError as error:
        fix = "pip install 'sdxl-trainer[ui]'"
        raise UserError(f"the studio needs the package {error.name}", "sdxl ui", fix) from None
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'", "sdxl ui", "make it first, or give another one")
    listening = _listen(port)
    port = listening.getsockname()[1]
    made = app.create(folder, token := app.Workspace(folder.resolve()).token(), port)
    address = f"http://{HOST}:{port}/?token={token}"
    print(f"the studio of {folder.resolve()} is at\n  {address}\nCtrl-C ends it; trainings go on", flush=True)
    if show:
        webbrowser.open(address)
    config = uvicorn.Config(made, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def _listen(port: int) -> socket.socket:
    """A socket that only this machine can reach; port 0: any that is free."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise UserError(f"port {port}: {error.strerror}", "sdxl ui --port", "give another, or 0 for any") from None
    return listening
