"""The study in a browser: plain pages, which say nothing of methods. A vote is answered once it is on the disk."""

from __future__ import annotations

import logging
import sqlite3
from http import HTTPStatus
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from icd_lightning.apps.listening import listen
from icd_lightning.apps.study.store import PICTURES, SIDES, Store
from icd_lightning.evaluation.report.page import templates

log = logging.getLogger(__name__)

MOST_BYTES = 4096  # of a request's body
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # addresses hold tokens
    "X-Content-Type-Options": "nosniff",
}
HERE = Path(__file__).parent


class Pages:
    """What the study's addresses answer."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.templates = Jinja2Templates(env=templates(HERE / "pages"))
        self.templates.env.globals["title"] = store.plan.title

    def page(self, request: Request, name: str, status: int = 200, **context: object) -> Response:
        """A page that no browser keeps."""
        headers = {"Cache-Control": "no-store"}
        return self.templates.TemplateResponse(request, f"{name}.html.j2", context, status, headers)

    def start(self, request: Request) -> Response:
        return self.page(request, "start")

    def join(self, request: Request) -> Response:
        if (token := self.store.join()) is None:
            raise HTTPException(503, "Too many people have just begun: try again in half an hour.")
        return RedirectResponse(request.url_for("assess", token=token).path, HTTPStatus.SEE_OTHER)

    def assess(self, request: Request) -> Response:
        token = self.token(request)
        if (shown := self.store.next_task(token)) is None:
            return self.page(request, "done")
        return self.page(request, "task", shown=shown, address=str(request.url))

    async def vote(self, request: Request) -> Response:
        """Record a choice and go on; the same again changes nothing, and another is refused."""
        form = await request.form()
        return await run_in_threadpool(self.record, request, str(form.get("task")), str(form.get("choice")))

    def record(self, request: Request, task: str, choice: str) -> Response:
        token = self.token(request)
        if choice not in SIDES:
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"A choice is one of {', '.join(SIDES)}.")
        recorded = self.store.vote(token, task, choice)
        if recorded is None:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "This comparison was not given to you.")
        if recorded != choice:
            raise HTTPException(HTTPStatus.CONFLICT, "You have answered this comparison already; that answer counts.")
        return RedirectResponse(request.url_for("assess", token=token).path, HTTPStatus.SEE_OTHER)

    def token(self, request: Request) -> str:
        token = request.path_params["token"]
        if not self.store.knows(token):
            raise HTTPException(404, "Nobody has this address: begin anew, or look at your link again.")
        return token

    def refuse(self, request: Request, error: HTTPException) -> Response:
        response = self.page(request, "error", error.status_code, message=error.detail)
        response.headers.update(error.headers or {})
        return response

    def leave(self, request: Request, error: ClientDisconnect) -> Response:
        """Who has gone reads nothing."""
        return Response(status_code=HTTPStatus.BAD_REQUEST)

    def fail(self, request: Request, error: sqlite3.Error) -> Response:
        """What could not be written was not answered before."""
        log.error("%s: %s", self.store.file, error)
        return self.page(request, "error", 503, message="Nothing was recorded: try again in a minute.")


def application(store: Store) -> Starlette:
    pages = Pages(store)
    routes = [
        Route("/", pages.start),
        Route("/join", pages.join, methods=["POST"]),
        Route("/a/{token}", pages.assess, name="assess"),
        Route("/a/{token}/votes", pages.vote, methods=["POST"], name="vote"),
        Mount("/pictures", StaticFiles(directory=store.file.parent / PICTURES), name="pictures"),
        Mount("/static", StaticFiles(directory=HERE / "static"), name="static"),
    ]
    handlers = {HTTPException: pages.refuse, ClientDisconnect: pages.leave, sqlite3.Error: pages.fail}
    return Starlette(routes=routes, exception_handlers=handlers, max_body_size=MOST_BYTES)


def server(store: Store) -> uvicorn.Server:
    """What serves the application, and logs no address: they hold tokens."""
    headers = list(HEADERS.items())
    options = {"log_level": "warning", "access_log": False, "server_header": False, "headers": headers}
    return uvicorn.Server(uvicorn.Config(application(store), **options))


def serve(folder: Path, host: str, port: int) -> None:
    store = Store(folder)
    store.check_pictures()
    with listen(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        log.info("%s: http://%s:%d/ (Ctrl-C stops; votes are kept)", folder, name, listening.getsockname()[1])
        server(store).run(sockets=[listening])
    store.close()
