"""The guard of the lessons' server: who gets past it, what everybody else is told, and what every answer carries."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallline.lessons import security
from fallline.lessons.security import LARGEST_BODY, REQUESTS_AT_ONCE, REQUESTS_PER_SECOND, Guard

PORT = 8426
HOST = f"127.0.0.1:{PORT}"
ORIGIN = f"http://{HOST}"
TOKEN = "the-right-token"
ALLOWED = [HOST, f"localhost:{PORT}", f"[::1]:{PORT}"]
HINT = "`fallline learn`"

Lines = list[tuple[str, str]]
Message = dict[str, Any]


class Behind:
    """The application behind the guard: it notes what reaches it, and answers with the body that it was given."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/x-own")]})
        await send({"type": "http.response.body", "body": body})


@dataclass(frozen=True)
class Answer:
    """What came back, how much of the request was read, and whether it reached what is behind the guard."""

    status: int
    lines: Lines
    body: bytes
    reached: bool
    read: int

    def header(self, name: str) -> str:
        """A header that there must be exactly once."""
        (value,) = [value for line, value in self.lines if line == name]
        return value

    def has(self, name: str) -> bool:
        return any(line == name for line, _ in self.lines)

    def policy(self) -> dict[str, list[str]]:
        """The content security policy: the sources of each of its directives."""
        directives = [directive.split() for directive in self.header("content-security-policy").split(";")]
        return {name: sources for name, *sources in directives}

    def nonce(self) -> str:
        (found,) = [source for source in self.policy()["style-src"] if source.startswith("'nonce-")]
        return found.removeprefix("'nonce-").removesuffix("'")


class Server:
    """A guard with an application behind it, and how to ask it."""

    def __init__(self, port: int = PORT) -> None:
        self.behind = Behind()
        self.guard = Guard(self.behind, port=port, token=TOKEN)

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        lines: Lines | None = None,
        *,
        query: bytes = b"",
        messages: Sequence[Message] = ({"type": "http.request", "body": b"", "more_body": False},),
        kind: str = "http",
    ) -> Answer:
        """Sends a request by the guard, and gives what came back."""
        lines = self.right(method) if lines is None else lines
        headers = [(name.encode(), value.encode("latin-1")) for name, value in lines]
        scope = {"type": kind, "method": method, "path": path, "query_string": query, "headers": headers}
        sent: list[Message] = []
        left = list(messages)

        async def receive() -> Message:
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        before = len(self.behind.scopes)
        asyncio.run(self.guard(scope, receive, send))
        start, *rest = sent or [{"type": "nothing", "code": 0}]
        found = [(name.decode(), value.decode("latin-1")) for name, value in start.get("headers", [])]
        body = b"".join(message.get("body", b"") for message in rest)
        status = start["status"] if start["type"] == "http.response.start" else -start["code"]
        return Answer(status, found, body, len(self.behind.scopes) > before, len(messages) - len(left))

    @cached_property
    def cookie(self) -> str:
        """The cookie of a learner who has opened the address that was printed."""
        answer = self.ask(lines=[("host", HOST)], query=f"token={TOKEN}".encode())
        return answer.header("set-cookie").partition(";")[0]

    def right(self, method: str = "GET") -> Lines:
        """The headers of a request that the server's own page makes."""
        own = [("host", HOST), ("cookie", self.cookie), ("sec-fetch-site", "same-origin")]
        return own if method in ("GET", "HEAD") else [*own, ("origin", ORIGIN)]

    def changed(self, method: str = "GET", **to: str | None) -> Lines:
        """Those headers with others in the place of some, or without them."""
        names = {name.replace("_", "-"): value for name, value in to.items()}
        kept = [(name, value) for name, value in self.right(method) if name not in names]
        return [*kept, *((name, value) for name, value in names.items() if value is not None)]


@pytest.fixture
def server() -> Server:
    return Server()


def refused(answer: Answer, status: int) -> bool:
    """Whether a request was refused, and reached nothing."""
    return (answer.status, answer.reached) == (status, False)


# Where a request is sent to.


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("host", ALLOWED)
def test_the_servers_own_names_are_answered(server: Server, host: str, method: str):
    own = {"host": host, "origin": f"http://{host}" if method == "POST" else None}
    answer = server.ask(method, lines=server.changed(method, **own))
    assert (answer.status, answer.reached) == (200, True)


def test_one_name_of_this_machine_is_no_page_of_another(server: Server):
    """The server listens on one address of the machine; on another there may be somebody else."""
    for host, other in itertools.permutations(ALLOWED, 2):
        assert refused(server.ask("POST", lines=server.changed("POST", host=host, origin=f"http://{other}")), 403)


@pytest.mark.parametrize(
    "host",
    [
        f"evil.example:{PORT}",
        f"127.0.0.1:{PORT + 1}",
        f"127.0.0.1:{PORT}0",
        "127.0.0.1",
        f"127.0.0.1.evil.example:{PORT}",
        f"localhost.:{PORT}",
        f"::1:{PORT}",
        f"{HOST}, evil.example",
        f"evil.example@{HOST}",
        "",
        None,
    ],
)
def test_another_name_is_refused_whatever_else_is_right(server: Server, host: str | None):
    assert refused(server.ask(lines=server.changed(host=host)), 421)
    assert refused(server.ask("POST", lines=server.changed("POST", host=host)), 421)
    opening = server.ask(lines=server.changed(host=host, cookie=None), query=f"token={TOKEN}".encode())
    assert refused(opening, 421)
    assert not opening.has("set-cookie")


NAMES = st.text(st.characters(max_codepoint=255))
NEARLY = st.tuples(NAMES, st.sampled_from(ALLOWED), NAMES).map("".join)
GUARDED = Server()
OWN = GUARDED.right()


@given((NAMES | NEARLY).filter(lambda host: host not in ALLOWED))
def test_any_other_name_is_refused(host: str):
    assert refused(GUARDED.ask(lines=[("host", host), *OWN[1:]]), 421)


def test_port_80_may_go_without_saying():
    server = Server(port=80)
    assert server.ask(lines=[("host", "localhost")], query=f"token={TOKEN}".encode()).status == 303
    assert refused(server.ask(lines=[("host", "evil.example")], query=f"token={TOKEN}".encode()), 421)


# Where a request comes from.


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/events/which-loss"), ("POST", "/do/which-loss/run")]
)
@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        f"http://evil.example:{PORT}",
        f"http://127.0.0.1:{PORT + 1}",
        "http://127.0.0.1",
        f"{ORIGIN}.evil.example",
        f"http://evil.example/{ORIGIN}",
        f"http://http://{HOST}",
        f"https://{HOST}",  # the server speaks plain HTTP, so that a page there is somebody else's
        HOST,  # without a scheme it is no origin, and no browser sends it
        "null",
        "",
    ],
)
def test_a_page_from_elsewhere_is_refused(server: Server, origin: str, method: str, path: str):
    assert refused(server.ask(method, path, server.changed(method, origin=origin)), 403)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_servers_own_page_is_answered(server: Server, method: str):
    assert server.ask(method, "/do/which-loss/run", server.changed(method, origin=ORIGIN)).reached


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(("site", "passes"), [
    ("cross-site", False), ("same-site", False), ("", False), ("unheard-of", False),
    ("same-origin", True), ("none", True), (None, True),
])  # fmt: skip
def test_what_the_browser_says_of_the_site_counts(server: Server, method: str, site: str | None, passes: bool):
    answer = server.ask(method, lines=server.changed(method, sec_fetch_site=site))
    assert (answer.status, answer.reached) == ((200, True) if passes else (403, False))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_a_request_that_changes_something_says_where_it_comes_from(server: Server, method: str):
    assert refused(server.ask(method, lines=server.changed(method, origin=None)), 403)
    assert server.ask(method).reached


@pytest.mark.parametrize(("name", "right", "foreign", "status"), [
    ("host", HOST, f"evil.example:{PORT}", 421),
    ("origin", ORIGIN, "http://evil.example", 403),
    ("sec-fetch-site", "same-origin", "cross-site", 403),
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("foreign_first", [True, False])
def test_a_header_given_twice_smuggles_nothing_past(
    server: Server, method: str, name: str, right: str, foreign: str, status: int, foreign_first: bool
):
    others = [line for line in server.right(method) if line[0] != name]
    twice = [(name, foreign), (name, right)]
    answer = server.ask(method, lines=[*others, *(twice if foreign_first else reversed(twice))])
    assert not answer.reached
    assert answer.status in (400, status)


# The token and the cookie.


def test_the_token_is_traded_for_a_cookie(server: Server):
    answer = server.ask(lines=[("host", HOST), ("sec-fetch-site", "none")], query=f"token={TOKEN}".encode())
    assert refused(answer, 303)
    assert answer.header("location") == "/"
    assert answer.header("cache-control") == "no-store"
    cookie, *attributes = answer.header("set-cookie").split("; ")
    assert {attribute.lower() for attribute in attributes} == {"httponly", "samesite=strict", "path=/"}
    assert TOKEN not in cookie
    assert len(cookie.partition("=")[2]) >= 32
    assert server.ask(lines=[("host", HOST), ("cookie", cookie)]).reached


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"token",
        b"token=",
        b"token=wrong",
        b"token=" + TOKEN[:-1].encode(),
        b"token=" + TOKEN.encode() + b"x",
        b"token=" + TOKEN.upper().encode(),
        b"Token=" + TOKEN.encode(),
        b"token=wrong&token=" + TOKEN.encode(),
        b"token=" + TOKEN.encode() + b"&token=wrong",
        b"token=" + TOKEN.encode() + b"&token=" + TOKEN.encode(),
        "token=тоkеn".encode(),
        b"token=%D1%82%FF%00",
        b"token=\xff\xfe",
    ],
)
def test_any_other_token_opens_nothing(server: Server, query: bytes):
    answer = server.ask(lines=[("host", HOST)], query=query)
    assert refused(answer, 403)
    assert not answer.has("set-cookie")
    assert HINT in answer.body.decode()


@pytest.mark.parametrize("path", ["/which-loss", "//", "/index.html", "", "/events/which-loss", "/progress.json"])
def test_the_token_opens_the_first_page_only(server: Server, path: str):
    answer = server.ask(path=path, lines=[("host", HOST)], query=f"token={TOKEN}".encode())
    assert refused(answer, 403)
    assert not answer.has("set-cookie")


@pytest.mark.parametrize("lines", [
    [("sec-fetch-site", "cross-site")], [("sec-fetch-site", "same-site")], [("origin", "http://evil.example")],
])  # fmt: skip
def test_the_token_opens_nothing_to_another_site(server: Server, lines: Lines):
    answer = server.ask(lines=[("host", HOST), *lines], query=f"token={TOKEN}".encode())
    assert refused(answer, 403)
    assert not answer.has("set-cookie")


def test_two_servers_have_nothing_in_common():
    one, other = Server(), Server()
    assert one.cookie != other.cookie
    assert refused(one.ask(lines=one.changed(cookie=other.cookie)), 403)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "",
        f"fallline-{PORT}=",
        f"fallline-{PORT}",
        f"fallline-{PORT}=wrong",
        f"fallline-{PORT}={TOKEN}",
        "fallline-{other}={secret}",
        "{secret}",
        "fallline={secret}",
        "x-fallline-{port}={secret}",
        "fallline-{port}={secret}x",
        "fallline-{port}=x{secret}",
        "=;;= ; a/b=c",
        "a=\xff\xfe\x01",
        '"',
    ],
)
def test_without_the_cookie_of_this_run_there_is_nothing(server: Server, cookie: str | None, method: str):
    secret = server.cookie.partition("=")[2]
    given = None if cookie is None else cookie.format(secret=secret, port=PORT, other=PORT + 1)
    answer = server.ask(method, "/which-loss", server.changed(method, cookie=given))
    assert refused(answer, 403)
    assert HINT in answer.body.decode()
    assert secret not in answer.body.decode()


@pytest.mark.parametrize("other", ['theme={"dark": true}', "a/b=c", "words=two words", "name=Zoë", "x=a; y=b"])
def test_a_cookie_of_another_server_shuts_nobody_out(server: Server, other: str):
    """Browsers send the cookies of all the ports of a host, in whatever form they were set."""
    for cookie in (f"{other}; {server.cookie}", f"{server.cookie}; {other}"):
        assert server.ask(lines=server.changed(cookie=cookie)).reached, cookie


# How much.


def chunks(body: bytes, size: int) -> list[Message]:
    """A body as it comes in, piece by piece."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return [{"type": "http.request", "body": p, "more_body": i < len(pieces) - 1} for i, p in enumerate(pieces)]


@pytest.mark.parametrize("size", [LARGEST_BODY, 4096, 1000])
def test_the_largest_body_passes_whole(server: Server, size: int):
    body = bytes(range(256)) * (LARGEST_BODY // 256)
    answer = server.ask("POST", messages=chunks(body, size))
    assert (answer.status, answer.body == body) == (200, True)


@pytest.mark.parametrize("said", [None, "10", str(LARGEST_BODY), "-1", "much"])
@pytest.mark.parametrize("size", [LARGEST_BODY + 1, 4096, 1000])
def test_one_byte_more_is_refused_whatever_its_length_was_said_to_be(server: Server, size: int, said: str | None):
    body = bytes(LARGEST_BODY + 1)
    answer = server.ask("POST", lines=server.changed("POST", content_length=said), messages=chunks(body, size))
    assert refused(answer, 413)
    assert "256 KiB" in answer.body.decode()


def test_a_body_without_end_is_not_read_to_its_end(server: Server):
    answer = server.ask("POST", messages=chunks(bytes(20 * LARGEST_BODY), 64 * 1024))
    assert refused(answer, 413)
    assert answer.read == LARGEST_BODY // (64 * 1024) + 1


def test_a_body_that_was_cut_off_reaches_nothing(server: Server):
    """What is left of it could be taken for another request: nothing at all is one that resets a page."""
    begun = {"type": "http.request", "body": b"", "more_body": True}
    assert not server.ask("POST", messages=[begun, {"type": "http.disconnect"}]).reached


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is moved."""
    made = SimpleNamespace(now=1000.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(security, "time", made)
    return made


def test_too_many_requests_at_once_are_refused_until_some_time_has_passed(clock: SimpleNamespace):
    server = Server()
    lines = server.right()
    allowed = [server.ask(lines=lines) for _ in range(REQUESTS_AT_ONCE - 1)]  # the first one opened the page
    assert all(answer.reached for answer in allowed)
    late = server.ask(lines=lines)
    assert refused(late, 429)
    assert int(late.header("retry-after")) >= 1
    clock.now += int(late.header("retry-after"))
    again = [server.ask(lines=lines).reached for _ in range(int(REQUESTS_PER_SECOND) + 1)]
    assert again == [True] * int(REQUESTS_PER_SECOND) + [False]
    clock.now += 3600
    assert sum(server.ask(lines=lines).reached for _ in range(2 * REQUESTS_AT_ONCE)) == REQUESTS_AT_ONCE


def test_guesses_at_the_token_are_counted_too(clock: SimpleNamespace):
    server = Server()
    guesses = [server.ask(lines=[("host", HOST)], query=f"token={n}".encode()) for n in range(REQUESTS_AT_ONCE + 1)]
    assert [answer.status for answer in guesses] == [403] * REQUESTS_AT_ONCE + [429]
    assert refused(server.ask(lines=[("host", HOST)], query=f"token={TOKEN}".encode()), 429)


def test_another_site_cannot_use_up_what_a_learner_may_ask(clock: SimpleNamespace):
    server = Server()
    lines = server.right()
    for _ in range(2 * REQUESTS_AT_ONCE):
        assert refused(server.ask(lines=[*lines, ("origin", "http://evil.example")]), 403)
    assert server.ask(lines=lines).reached


# What there is besides requests.


@pytest.mark.parametrize("kind", ["websocket", "unheard-of"])
def test_there_are_no_web_sockets(server: Server, kind: str):
    answer = server.ask(kind=kind, messages=[{"type": "websocket.connect"}])
    assert refused(answer, -1008)


def test_starting_and_ending_are_passed_on(server: Server):
    passed = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope)

    scope = {"type": "lifespan"}
    asyncio.run(Guard(behind, port=PORT, token=TOKEN)(scope, None, None))  # type: ignore[arg-type]
    assert passed == [scope]


# What every answer carries.

ANSWERS = {
    "answered": 200,
    "answered a change": 200,
    "opened": 303,
    "without a cookie": 403,
    "from elsewhere": 403,
    "too large": 413,
    "elsewhere": 421,
    "too often": 429,
}


def answered(server: Server, case: str) -> Answer:
    """An answer of each kind."""
    match case:
        case "answered":
            return server.ask()
        case "answered a change":
            return server.ask("POST")
        case "opened":
            return server.ask(lines=[("host", HOST)], query=f"token={TOKEN}".encode())
        case "without a cookie":
            return server.ask(lines=[("host", HOST)])
        case "from elsewhere":
            return server.ask(lines=server.changed(origin="null"))
        case "too large":
            return server.ask("POST", messages=chunks(bytes(LARGEST_BODY + 1), LARGEST_BODY))
        case "elsewhere":
            return server.ask(lines=server.changed(host="evil.example"))
    lines = server.right()
    for _ in range(REQUESTS_AT_ONCE):
        server.ask(lines=lines)
    return server.ask(lines=lines)


@pytest.mark.parametrize(("case", "status"), ANSWERS.items())
def test_every_answer_tells_the_browser_to_be_careful(clock: SimpleNamespace, case: str, status: int):
    server = Server()
    answer = answered(server, case)
    assert answer.status == status
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("cross-origin-opener-policy") == "same-origin"
    assert answer.header("cross-origin-resource-policy") == "same-origin"
    assert answer.header("x-frame-options") == "DENY"
    assert not answer.has("access-control-allow-origin")
    policy = answer.policy()
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == ["'self'"]
    assert policy["connect-src"] == ["'self'"]
    for directive in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[directive] == ["'none'"]
    sources = {source for sources in policy.values() for source in sources}
    assert sources <= {"'none'", "'self'", "data:", f"'nonce-{answer.nonce()}'"}
    assert not {"'unsafe-inline'", "'unsafe-eval'"} & sources
    assert len(answer.nonce()) >= 16
    assert answer.nonce() != answered(Server(), case).nonce()


def test_a_page_is_given_the_nonce_of_its_answer_and_every_answer_has_another(server: Server):
    answers = [server.ask() for _ in range(5)]
    assert [scope["fallline.nonce"] for scope in server.behind.scopes] == [answer.nonce() for answer in answers]
    assert len({answer.nonce() for answer in answers}) == 5
    assert answers[0].header("content-type") == "text/x-own"


@pytest.mark.parametrize("case", ["without a cookie", "from elsewhere", "elsewhere", "too large", "too often"])
def test_a_refusal_is_a_sentence_that_is_not_kept(clock: SimpleNamespace, case: str):
    answer = answered(Server(), case)
    assert answer.header("content-type") == "text/plain; charset=utf-8"
    assert answer.header("cache-control") == "no-store"
    assert answer.body.decode().endswith(".")
