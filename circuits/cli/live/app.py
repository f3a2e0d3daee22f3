"""The web application of `sfc serve`: who may ask, and what for.

1. A socket of this machine alone (`listen`). Whoever asks must know the token: it stands in the address that is
   printed, and from then on in a cookie. Requests by another name of this machine (DNS rebinding), or on behalf of a
   page from elsewhere, are refused before anything is read of them.
2. No route takes a path: a page, its script and style, jobs by their number, names of features. Experiments write into
   `edits/` of the run; names go where `sfc labels` writes them.
3. `POST /jobs` begins a job, `GET /jobs/ID` follows it (server-sent events, from any point on), `DELETE` cancels it.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import json
import re
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from circuits.cli.live.experiments import Experiments
from circuits.cli.live.jobs import Job, Worker
from circuits.cli.live.requests import read_request
from circuits.report.page import report_html
from graphs.errors import GraphError
from sae._files import without_nan
from sae.errors import UserError, unknown

HOST = "127.0.0.1"
LONGEST_BODY = 2**20
"""Bytes of a request."""
PAUSE, ALIVE = 0.05, 15.0
"""Seconds between two looks at a job's events, and between two signs of life to its readers."""
HEADER = "x-sfc-token"
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
"""What every page's content security policy begins with."""
KEEP_LABEL = """
window.keepLabel = async (feature, label) => {
  const headers = { "content-type": "application/json" };
  const answer = await fetch("/labels", { method: "POST", headers, body: JSON.stringify({ feature, label }) });
  if (!answer.ok) throw new Error((await answer.json()).error);
};
"""
"""What a page of the viewer that is shown here can do beyond one in a file."""
HEADERS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "content-security-policy": POLICY.strip(),
}  # fmt: skip


def listen(port: int) -> socket.socket:
    """A socket on this machine alone; port 0 is any free one. Raises UserError for a port that cannot be had."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(64)
    except OSError as error:
        listening.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise UserError(f"port {port} {reason}: give another --port, or --port 0 for any that is free") from None
    return listening


class Guard:
    """Lets requests through that come from this machine by its own name, from the page itself, and with the token."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token, self.cookie = app, token, f"sfc_{port}"
        self.hosts = [f"{name}:{port}" for name in (HOST, "localhost")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                more = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in given
                ]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await (self.refusal(scope) or self.app)(scope, receive, send_guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that is not let through, or that brings the token."""
        headers, query = Headers(scope=scope), QueryParams(scope["query_string"])
        if headers.get("host") not in self.hosts:
            return PlainTextResponse(f"this server is http://{self.hosts[0]} alone", 421)
        origin = headers.get("origin")
        if origin is not None and origin not in [f"http://{host}" for host in self.hosts]:
            return PlainTextResponse("pages from elsewhere may not ask here", 403)
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] != "/":
            return PlainTextResponse("pages from elsewhere may not ask here", 403)
        if not headers.get("content-length", "0").isdecimal() or int(headers.get("content-length", "0")) > LONGEST_BODY:
            return PlainTextResponse(f"at most {LONGEST_BODY} bytes are read", 413)
        if scope["path"] == "/" and "token" in query and self._is_token(query["token"]):
            response = RedirectResponse("/", 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        if not self._is_token(headers.get(HEADER, "")) and not self._is_token(cookies.get(self.cookie, "")):
            return PlainTextResponse("open the address that sfc serve printed: it holds the token of this server", 401)
        return None

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def make_app(experiments: Experiments, worker: Worker, *, token: str, port: int) -> ASGIApp:
    """The application, guarded."""
    routes = _Routes(experiments, worker)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/live.js", routes.asset),
            Route("/live.css", routes.asset),
            Route("/run", routes.overview),
            Route("/edits", routes.edits),
            Route("/jobs", routes.begin, methods=["POST"]),
            Route("/jobs/{id}", routes.follow),
            Route("/jobs/{id}", routes.cancel, methods=["DELETE"]),
            Route("/circuit", routes.circuit),
            Route("/circuits/{id}", routes.circuit),
            Route("/features", routes.features),
            Route("/labels", routes.label, methods=["POST"]),
            Route("/report", routes.report),
        ],
        exception_handlers={UserError: _mistake, GraphError: _mistake},
    )
    return Guard(app, token, port)


def _mistake(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


class _Routes:
    """The answer of each address."""

    def __init__(self, experiments: Experiments, worker: Worker) -> None:
        self.experiments, self.worker = experiments, worker
        self.experiment_of: dict[str, Callable[[Job, Any], Any]] = {
            "prompt": experiments.look_at, "edit": experiments.try_edit, "circuit": experiments.find_circuit,
        }  # fmt: skip

    async def page(self, request: Request) -> Response:
        policy = POLICY + "script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
        return HTMLResponse(_asset("live.html.j2"), headers={"content-security-policy": policy})

    async def asset(self, request: Request) -> Response:
        if request.url.path == "/live.css":
            return Response(_asset("explorer.css") + _asset("live.css"), media_type="text/css")
        return Response(_asset("live.js"), media_type="text/javascript")

    async def overview(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.experiments.overview))

    async def edits(self, request: Request) -> Response:
        return JSONResponse(without_nan(await run_in_threadpool(self.experiments.done)))

    async def begin(self, request: Request) -> Response:
        body = await _read_body(request)
        kind = body.pop("kind", None)
        if kind not in self.experiment_of:
            raise unknown("kind", str(kind), self.experiment_of)
        record, experiment = read_request(kind, body), self.experiment_of[kind]
        return JSONResponse({"id": self.worker.submit(lambda job: experiment(job, record)).id})

    async def follow(self, request: Request) -> Response:
        """Events of a job from number Last-Event-ID + 1 on, until its last."""
        last = request.headers.get("last-event-id", "")
        events = _events(self._job(request), int(last) + 1 if last.isdecimal() else 0)
        return StreamingResponse(events, media_type="text/event-stream")

    async def cancel(self, request: Request) -> Response:
        self.worker.cancel(self._job(request).id)
        return JSONResponse({})

    def _job(self, request: Request) -> Job:
        job = self.worker.jobs.get(request.path_params["id"])
        if job is None:
            raise UserError("there is no such experiment here (any more)")
        return job

    async def circuit(self, request: Request) -> Response:
        """The explorer of the run's circuit, or of one that was found here."""
        id = request.path_params.get("id")
        if id is not None and id not in self.experiments.pages:
            raise UserError("this circuit is not open any more: find it again")
        return _viewer(await run_in_threadpool(lambda: self.experiments.pages[id] if id else self.experiments.explorer))

    async def features(self, request: Request) -> Response:
        """The feature pages that the run has."""
        return _viewer(await run_in_threadpool(self.experiments.features_page))

    async def label(self, request: Request) -> Response:
        """Write down what a feature is called; the overview with the new name."""
        name = read_request("label", await _read_body(request))
        return JSONResponse(await run_in_threadpool(self.experiments.name_feature, name.feature, name.label))

    async def report(self, request: Request) -> Response:
        page = await run_in_threadpool(report_html, self.experiments.run)
        policy = POLICY + "style-src 'unsafe-inline'; img-src data:"
        return HTMLResponse(page, headers={"content-security-policy": policy})


async def _read_body(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body, of which no more than `LONGEST_BODY` bytes are read."""
    if not re.match(r"application/json\b", request.headers.get("content-type", "")):
        raise UserError("requests are JSON: give content-type application/json")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > LONGEST_BODY:
            raise UserError(f"at most {LONGEST_BODY} bytes are read")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise UserError("the request is no JSON object")
    return body


async def _events(job: Job, number: int) -> AsyncIterator[str]:
    """A job's events from a number on, as server-sent events."""
    waited = 0.0
    while True:
        while number < len(job.events):
            yield f"id: {number}\ndata: {json.dumps(without_nan(job.events[number]))}\n\n"
            number, waited = number + 1, 0.0
        if job.ended and number >= len(job.events):
            return
        await asyncio.sleep(PAUSE)
        waited += PAUSE
        if waited > ALIVE:
            yield ": alive\n\n"
            waited = 0.0


def _viewer(page: str) -> Response:
    """A page of which only the viewer's scripts, its last two, may run, and `KEEP_LABEL`, which writes names down."""
    *_, charts, script = re.findall(r"(?s)<script[^>]*>(.*?)</script>", page)
    page = page.replace('<div id="app">', f'<script>{KEEP_LABEL}</script>\n<div id="app">', 1)
    page = page.replace("img-src data: blob:", "img-src data: blob:; connect-src 'self'", 1)
    scripts = (charts, script, KEEP_LABEL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'"
    return HTMLResponse(page, headers={"content-security-policy": POLICY + policy})


def _asset(name: str) -> str:
    return resources.files("graphs.explorer").joinpath(name).read_text(encoding="utf-8")
