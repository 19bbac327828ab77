"""Who may talk to the studio: holders of the token, from its own page, to its own name, in bounded amounts."""

import hmac
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Bytes of a request's body. Pictures and archives are uploaded one by one and written to disk as they come.
LARGEST, LARGEST_UPLOAD = 8 << 20, 4 << 30
UPLOADS = "/api/upload"
# A page of another origin cannot send a header of its own making without asking first, which is never allowed.
HEADER = "x-studio"
CHANGES = {"POST", "PUT", "DELETE", "PATCH"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ALWAYS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class TooLarge(Exception):
    """The body is longer than it said, or than is allowed."""


@dataclass(frozen=True)
class Guard:
    """ASGI middleware. Refused: another Host (so that no name can be made to point here), another Origin, no token,
    changes without the page's own header, bodies that are too large."""

    app: ASGIApp
    token: str
    port: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = self.refused(scope) if scope["type"] == "http" else PlainTextResponse("not here", 404)
        if answer is not None:
            await answer(scope, receive, hardened(send))
            return
        limit = LARGEST_UPLOAD if scope["path"].startswith(UPLOADS) else LARGEST
        try:
            await self.app(scope, bounded(receive, limit), hardened(send))
        except TooLarge:
            await PlainTextResponse("too large", 413)(scope, receive, hardened(send))

    def refused(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further; None if it may pass."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        hosts = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost")}
        if headers.get("host") not in hosts:
            return PlainTextResponse("this address is not the studio's", 403)
        origin = headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in hosts}:
            return PlainTextResponse("requests of other pages are refused", 403)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if path == "/" and method == "GET" and self.known(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
            return answer
        if not (self.known(self.cookie_of(headers)) or self.known(bearer(headers))):
            return PlainTextResponse("Open the address that `sdxl ui` printed: it holds the token.", 401)
        if method in CHANGES and HEADER not in headers:
            return PlainTextResponse(f"changes need the header {HEADER}", 403)
        limit = LARGEST_UPLOAD if path.startswith(UPLOADS) else LARGEST
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            return PlainTextResponse("too large", 413)
        return None

    @property
    def cookie(self) -> str:
        """Cookies do not know ports: each studio has a name of its own."""
        return f"studio-{self.port}"

    def cookie_of(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def known(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


def bounded(receive: Receive, limit: int) -> Receive:
    """Bodies without a length are counted as they come."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise TooLarge
        return message

    return counted


def hardened(send: Send) -> Send:
    """Every answer says what the page may load and run: only what comes from here. What an answer says itself wins."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[Any] = message.setdefault("headers", [])
            there = {name.lower() for name, _ in headers}
            headers += [(n.encode(), v.encode()) for n, v in ALWAYS.items() if n.encode() not in there]
        await send(message)

    return sent
