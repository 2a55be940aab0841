"""Serve the explorer to a browser on this machine, and to nobody else.

The server listens on the loopback interface alone. Every address begins with a random token, which
other users and pages do not know. Host must be ours: a foreign name that resolves to this machine
(DNS rebinding) is refused, and so are requests that pages of other origins send. Images are served
by their number, never by a path.
"""

import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.images.decode import READ_ERRORS, decode, read_error_reason
from ...errors import UserError, printable
from ...io.files import reason_of
from ..page import content_hash, escape, package_file, page_script
from .space import LABEL, Space, open_space

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_BYTES = 32 << 20
"""Size of a request's body."""
SIDES = (96, 320)
_FOUND = 10_000  # images that a search by text returns
_LONGEST_LABEL = 200  # characters


def explore(place: str | Path, *, port: int = 0, workers: int = 2) -> None:
    """Show a run or table in the browser until Ctrl-C.

    Labels go to ``labels.csv`` in the run, or FILE.labels.csv beside FILE.parquet.

    Args:
        place: run folder, or table written by ``localagg embed``.
        port: TCP port of 127.0.0.1; 0 takes a free one.
        workers: processes that decode, if the images must be embedded first.

    Raises:
        UserError: no such run or table, an occupied port, or starlette or uvicorn is missing.
    """
    try:
        import starlette.applications  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            "missing-extra", f"{error.name} is missing: pip install 'localagg[explore]'."
        ) from None
    with _listen(port) as listener:
        space, token = open_space(Path(place), workers), secrets.token_urlsafe(16)
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        app = make_app(space, token, host, title=Path(place).resolve().name)
        print(f"{len(space):,} images. Open http://{host}/{token}/  (Ctrl-C ends)", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=2
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise UserError("option-invalid", f"--port is {port}; it must be 0 to 65535.")
    # asyncio sends small answers without a delay of 40 ms only where the protocol is named.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # now: two programs may bind, while both load their images
    except OSError as error:
        listener.close()
        raise UserError(
            "environment", f"--port {port} cannot be used ({error.strerror}); name another."
        ) from None
    return listener


def make_app(space: Space, token: str, host: str, *, title: str) -> "Starlette":
    """Return the application, which answers below ``/token/`` for this Host only."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route

    page, policy = _page(title)
    answers = _Answers(space, page)
    routes: list[Any] = [
        Route("/", answers.index),
        Route("/data", answers.data),
        Route("/array/{name}", answers.array),
        Route("/picture/{number:int}/{side:int}", answers.picture),
        Route("/details/{number:int}", answers.details),
        Route("/find", answers.find),
        *(
            Route(f"/{action.__name__}", _posted(action), methods=["POST"])
            for action in (answers.search, answers.paths, answers.label)
        ),
    ]
    handlers: Any = {_Refused: lambda _, error: JSONResponse({"error": str(error)}, error.status)}
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=handlers)
    app.add_middleware(_Guard, host=host, policy=policy)  # pyright: ignore[reportArgumentType]
    return app


class _Answers:
    """The answers by address: first those that are read, then those that are posted to."""

    def __init__(self, space: Space, page: str) -> None:
        self.space, self.page = space, page

    def index(self, _: "Request") -> "Response":
        return _response(self.page, "text/html")

    def data(self, _: "Request") -> "Response":
        from starlette.responses import JSONResponse

        space = self.space
        note = " ".join(space.shown.notes)
        typed = {"name": LABEL, "names": space.label_column()[0], "array": LABEL}
        facts = {"count": len(space), "columns": [*space.columns, typed], "map": {"note": note}}
        return JSONResponse({**facts, "side": SIDES[1], "labels": printable(space.labels.name)})

    def array(self, request: "Request") -> "Response":
        name = request.path_params["name"]
        found = self.space.label_column()[1] if name == LABEL else self.space.arrays.get(name)
        if found is None:
            raise _Refused(404, "There is no such array.")
        return _response(found.tobytes(), "application/octet-stream")

    def picture(self, request: "Request") -> "Response":
        side = request.path_params["side"]
        drawn = self.space.picture(self._number(request), side) if side in SIDES else None
        if drawn is None:
            raise _Refused(404, "There is no such picture.")
        return _response(drawn, "image/webp", {"Cache-Control": "max-age=3600"})

    def details(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        number, shown = self._number(request), self.space.shown
        near = self.space.nearest(shown.rows[number : number + 1], own=number)
        return JSONResponse({"path": shown.paths[number], "neighbors": near})

    def find(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        text = request.query_params.get("text", "")[:1000]
        return JSONResponse(self.space.find(text, _FOUND))

    def search(self, body: bytes) -> Any:
        try:
            decode(body, levels=self.space.shown.levels)
        except READ_ERRORS as error:
            raise _Refused(400, f"The picture cannot be read: {read_error_reason(error)}") from None
        return self.space.nearest(self.space.embed(body))

    def paths(self, body: bytes) -> Any:
        numbers = _numbers(json.loads(body), len(self.space))
        return [self.space.shown.paths[number] for number in numbers]

    def label(self, body: bytes) -> Any:
        asked = json.loads(body)
        text = asked["label"].strip()
        if len(text) > _LONGEST_LABEL or printable(text) != text:
            raise _Refused(400, f"A label has at most {_LONGEST_LABEL} printable characters.")
        self.space.label(_numbers(asked["ids"], len(self.space)), text)
        return self.space.label_column()[0]

    def _number(self, request: "Request") -> int:
        number = request.path_params["number"]
        if number >= len(self.space):
            raise _Refused(404, "There is no such image.")
        return number


def _response(
    content: str | bytes, media_type: str, headers: dict[str, str] | None = None
) -> "Response":
    from starlette.responses import Response

    return Response(content, media_type=media_type, headers=headers)


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _posted(action: Callable[[bytes], Any]) -> Callable[["Request"], Awaitable["Response"]]:
    """Return an endpoint that reads a limited body, and answers in JSON."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

    async def endpoint(request: "Request") -> "Response":
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise _Refused(413, f"At most {MOST_BYTES >> 20} MB are read.")
        try:
            return JSONResponse(await run_in_threadpool(action, bytes(body)))
        except UserError as error:
            raise _Refused(409, str(error)) from None
        except OSError as error:  # labels are written beside the table
            raise _Refused(409, f"'{error.filename}': {reason_of(error)}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise _Refused(400, "The request is not understood.") from None

    return endpoint


def _numbers(values: Any, count: int) -> list[int]:
    """Return numbers of images.

    Raises:
        ValueError: others.
    """
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < count for v in values):
        raise ValueError(values)
    return values


class _Guard:
    """Refuse requests of other hosts and origins, and send the policy with every answer."""

    def __init__(self, app: Any, host: str, policy: str) -> None:
        self.app = app
        port = host.rpartition(":")[2]
        self.hosts = {host, f"localhost:{port}"}
        self.origins = {f"http://{each}" for each in self.hosts}
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        ours = asked.get("host") in self.hosts
        ours &= asked.get("origin") is None or asked["origin"] in self.origins
        ours &= asked.get("sec-fetch-site", "none") in ("none", "same-origin")
        app = self.app if ours else PlainTextResponse("Refused.", 403)

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self.headers)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await app(scope, receive, send_guarded)


def _page(title: str) -> tuple[str, str]:
    """Return the page and its policy (CSP)."""
    style = package_file("page.css")
    script = page_script() + package_file("explorer/explore.js")
    policy = (
        "default-src 'none'; img-src 'self' data:; connect-src 'self';"
        f" style-src {content_hash(style)}; script-src {content_hash(script)};"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    page = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<link rel=icon href='data:,'><title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><header><h1>{escape(title)}</h1><nav></nav></header><main id=parts></main>"
        f"<script type=module>{script}</script></body></html>"
    )
    return page, policy
