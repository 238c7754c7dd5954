"""Who may talk to the server: one browser on this machine, from the server's own pages, within bounds.

The server stands between a learner's browser and kernels that run any code, so every request is checked, streams too:
the name that it was sent to (against DNS rebinding), the page that it comes from (against other sites and other local
servers), the cookie of this run, and its size and rate.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 256 * 1024
REQUESTS_AT_ONCE = 120
REQUESTS_PER_SECOND = 30.0
SAFE = ("GET", "HEAD")

HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Guard:
    """Lets through what comes from the server's own pages; refuses the rest with a sentence.

    Args:
        app: what is behind it.
        port: that the server listens on.
        token: that opens the first page; it is traded for a cookie.
    """

    def __init__(self, app: App, *, port: int, token: str) -> None:
        self.app = app
        self.token = token
        self.cookie = f"fallline-{port}"  # cookies are shared by all the ports of a host
        self.secret = secrets.token_urlsafe(32)
        names = {"127.0.0.1", "localhost", "[::1]"}
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
        self.bucket = Bucket(REQUESTS_AT_ONCE, REQUESTS_PER_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        if scope["type"] != "http":  # there are no web sockets
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope, headers)
        if refusal is None and self._opens(scope):
            await _answer(send, 303, "", {"location": "/", "set-cookie": self._set_cookie()})
            return
        if refusal is None and not self._knows(headers):
            refusal = 403, "This page belongs to another run: open the address that `fallline learn` printed."
        if refusal is not None:
            await _answer(send, *refusal)
            return
        try:
            body = await _body(receive) if scope["method"] not in SAFE else b""
        except ConnectionError:
            return
        if body is None:
            await _answer(send, 413, f"A request may have {LARGEST_BODY // 1024} KiB.")
            return
        nonce = secrets.token_urlsafe(16)
        scope["fallline.nonce"] = nonce
        policy = POLICY.format(nonce=nonce)

        async def replayed() -> MutableMapping[str, Any]:
            nonlocal body
            if body is None:
                return await receive()
            given, body = body, None
            return {"type": "http.request", "body": given, "more_body": False}

        async def secured(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_encoded({**HEADERS, "content-security-policy": policy})]
            await send(message)

        await self.app(scope, replayed, secured)

    def _refusal(self, scope: Scope, headers: Mapping[str, list[str]]) -> tuple[int, str] | None:
        """Why a request is refused, whoever sent it. Of a header that is given more than once every value counts."""
        # The names of this machine are not taken for each other: on another of its addresses somebody else may listen.
        hosts, origins, sites = (headers.get(name, []) for name in ("host", "origin", "sec-fetch-site"))
        if not hosts or not self.hosts.issuperset(hosts):
            return 421, "This server answers on this machine's own address only."
        if not {f"http://{host}" for host in hosts}.issuperset(origins) or not {"same-origin", "none"}.issuperset(
            sites
        ):
            return 403, "The request comes from another site."
        if not origins and scope["method"] not in SAFE:
            return 403, "The request does not say where it comes from."
        if not self.bucket.take():
            return 429, "Too many requests: wait a second."
        return None

    def _opens(self, scope: Scope) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return scope["path"] == "/" and len(given) == 1 and _same(given[0], self.token)

    def _knows(self, headers: Mapping[str, list[str]]) -> bool:
        # Not by http.cookies, which gives up on all cookies where another server of this host has set an odd one.
        pairs = [pair.strip().partition("=") for line in headers.get("cookie", []) for pair in line.split(";")]
        found = [value for name, _, value in pairs if name == self.cookie]
        return any(_same(value, self.secret) for value in found)

    def _set_cookie(self) -> str:
        return f"{self.cookie}={self.secret}; HttpOnly; SameSite=Strict; Path=/"


class Bucket:
    """Lets so many pass at once, and so many a second from then on.

    >>> bucket = Bucket(2, 0.001)
    >>> [bucket.take() for _ in range(3)]
    [True, True, False]
    """

    def __init__(self, most: int, per_second: float) -> None:
        self.most = most
        self.per_second = per_second
        self._left = float(most)
        self._seen = time.monotonic()

    def take(self) -> bool:
        """Whether another one may pass now."""
        now = time.monotonic()
        self._left = min(self.most, self._left + (now - self._seen) * self.per_second)
        self._seen = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


async def _body(receive: Receive) -> bytes | None:
    """A request's body, or None where it is too large.

    Raises:
        ConnectionError: when it ends before its end.
    """
    found = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        found += message.get("body", b"")
        if len(found) > LARGEST_BODY:
            return None
        if not message.get("more_body"):
            return bytes(found)


def _same(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


async def _answer(send: Send, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
    own = {**HEADERS, "content-type": "text/plain; charset=utf-8", "cache-control": "no-store", **(headers or {})}
    own |= {"retry-after": "1"} if status == 429 else {}
    own["content-security-policy"] = POLICY.format(nonce=secrets.token_urlsafe(16))
    await send({"type": "http.response.start", "status": status, "headers": _encoded(own)})
    await send({"type": "http.response.body", "body": text.encode()})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
