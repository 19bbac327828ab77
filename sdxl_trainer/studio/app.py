"""The studio as an ASGI app. Everything that takes long is a command in a process of its own."""

import asyncio
import contextlib
import json
import threading
import zipfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sdxl_trainer.errors import UserError
from sdxl_trainer.report import frame
from sdxl_trainer.studio import actions, uploads
from sdxl_trainer.studio.guard import Guard, TooLarge
from sdxl_trainer.studio.jobs import Jobs
from sdxl_trainer.studio.workspace import Workspace

STATIC = Path(__file__).parent / "static"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The report's own style and script: its parts look alike here.
SHARED = {"page.css": frame.ASSETS / "page.css", "page.js": frame.ASSETS / "page.js"}
SHOWN = {".png", ".html"}  # what the browser shows; all else is offered to be kept
# A page from a run's folder may run its script, but it is nobody here: no cookie, no requests.
ALONE = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
BETWEEN = 0.5  # seconds between looks at what runs


@dataclass(frozen=True)
class Studio:
    """What the handlers work on. `lock`: captions are changed by one request at a time."""

    workspace: Workspace
    jobs: Jobs
    lock: Any = field(default_factory=threading.Lock)


def create(folder: Path, token: str, port: int) -> Starlette:
    """The app for a folder; only requests to 127.0.0.1 or localhost at `port` that hold `token` are answered."""
    workspace = Workspace(folder.resolve())
    studio = Studio(workspace, Jobs(workspace.state / "jobs", workspace.folder))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        ticking = asyncio.create_task(_tick(studio.jobs))
        yield
        ticking.cancel()

    routes = [Route(path, _json(studio, do), methods=[method]) for (method, path), do in actions.ACTIONS.items()]
    routes += [Route(path, _bytes(studio, do), methods=["GET"]) for path, do in actions.FILES.items()]
    routes += [
        Route("/", _static, methods=["GET"]),
        Route("/static/{name}", _static, methods=["GET"]),
        Route("/api/events", _events(studio), methods=["GET"]),
        Route("/api/upload", _upload(studio), methods=["PUT"]),
    ]
    made = Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, token=token, port=port)])
    made.state.studio = studio
    return made


async def _tick(jobs: Jobs) -> None:
    """The queue goes on when no page is open."""
    while True:
        await run_in_threadpool(jobs.tick)
        await asyncio.sleep(BETWEEN)


def _refusal(error: UserError) -> Response:
    return JSONResponse({"what": error.what, "where": error.where, "fix": error.fix}, 400)


def _json(studio: Studio, do: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of a plain function from (studio, what was sent) to what is answered."""

    async def endpoint(request: Request) -> Response:
        try:
            sent: Any = dict(request.query_params) if request.method == "GET" else await request.json()
            if not isinstance(sent, dict):
                raise ValueError
        except (ValueError, RecursionError):
            return _refusal(UserError("the request is not a JSON object", "request", "send one"))
        try:
            answer = await run_in_threadpool(do, studio, sent)
        except UserError as error:
            return _refusal(error)
        # In ASCII: halves of characters, which names of files can hold, are no UTF-8.
        return Response(json.dumps(answer), media_type="application/json")

    return endpoint


def _bytes(studio: Studio, do: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of a function that gives a file's path, or bytes with their media type."""

    async def endpoint(request: Request) -> Response:
        try:
            answer = await run_in_threadpool(do, studio, dict(request.query_params))
        except UserError as error:
            return _refusal(error)
        if isinstance(answer, Path):
            kind = "inline" if answer.suffix in SHOWN else "attachment"
            headers = {"content-security-policy": ALONE}
            return FileResponse(answer, headers=headers, filename=answer.name, content_disposition_type=kind)
        content, media_type = answer
        return Response(content, media_type=media_type, headers={"cache-control": "private, max-age=3600"})

    return endpoint


async def _static(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    path = SHARED.get(name) or STATIC / Path(name).name
    if path.suffix not in KINDS or not path.is_file():
        return Response("there is nothing here", 404)
    return FileResponse(path, media_type=KINDS[path.suffix])


def _events(studio: Studio) -> Callable[..., Any]:
    """Server-sent events: what runs, whenever it has changed."""

    async def endpoint(request: Request) -> Response:
        async def told() -> AsyncIterator[str]:
            last, silent = "", 0
            while not await request.is_disconnected():
                seen = json.dumps(await run_in_threadpool(actions.watched, studio, {}), ensure_ascii=True)
                if seen != last:
                    last, silent = seen, 0
                    yield f"data: {seen}\n\n"
                elif (silent := silent + 1) % 30 == 0:
                    yield ": still here\n\n"
                await asyncio.sleep(BETWEEN)

        return StreamingResponse(told(), media_type="text/event-stream")

    return endpoint


def _upload(studio: Studio) -> Callable[..., Any]:
    """One file into a folder of uploads: a picture, a text, or an archive of them, written as it comes."""

    async def endpoint(request: Request) -> Response:
        try:
            target, partial = uploads.place(studio.workspace, dict(request.query_params))
            try:
                with partial.open("wb") as file:
                    async for chunk in request.stream():
                        await run_in_threadpool(file.write, chunk)
                added = await run_in_threadpool(uploads.done, target, partial)
            finally:
                partial.unlink(missing_ok=True)
        except UserError as error:
            return _refusal(error)
        except zipfile.BadZipFile:
            return _refusal(UserError("the archive is damaged", "upload", "make it again"))
        except TooLarge:
            return Response("too large", 413)
        return JSONResponse({"folder": str(target.parent), **added})

    return endpoint
