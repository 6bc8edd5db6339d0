"""Servers of this machine: archives by ranges, and the few routes of a hub that uploads and downloads take."""

import base64
import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

COMMIT = "c" * 40


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def packed(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """A .tar.gz of these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


class Archives:
    """Files by name; what it was asked for, and where it breaks off."""

    def __init__(self, ranges: bool = True) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.said: dict[str, int] = {}  # sizes that are told and are not true; then no answer says its length
        self.asked: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []  # how much each of the next answers sends before the connection breaks
        self.ranges = ranges

    def handler(self) -> type[BaseHTTPRequestHandler]:
        archives = self

        class Handler(Quiet):
            def do_HEAD(self) -> None:
                name = self.path.rpartition("/")[2]
                if name not in archives.files:
                    return self.answer(404)
                etag = archives.etags.get(name, hashlib.md5(archives.files[name]).hexdigest())
                self.send_response(200)
                self.send_header("Content-Length", str(archives.said.get(name, len(archives.files[name]))))
                self.send_header("ETag", f'"{etag}"')
                self.end_headers()

            def do_GET(self) -> None:
                name, asked = self.path.rpartition("/")[2], self.headers.get("Range")
                archives.asked.append((name, asked))
                whole = archives.files[name]
                start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and archives.ranges else 0
                body = whole[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
                if name not in archives.said:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.close_connection = name in archives.said
                if not archives.cuts:
                    self.wfile.write(body)
                    return
                self.wfile.write(body[: archives.cuts.pop(0)])
                self.close_connection = True

        return Handler


class Hub:
    """A hub that keeps what is pushed: repositories by name, each file's content by its name."""

    token = "hf_of_a_test"

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/validate-yaml":
                    return self.say({"errors": [], "warnings": []})
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.answer(401, b'{"error": "Invalid username or password."}')
                for pattern, route in self.routes.items():
                    if found := re.fullmatch(pattern, self.path):
                        return route(self, body, *found.groups())
                self.answer(404)

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
                hub.large[self.path.rpartition("/")[2]] = body
                self.answer(200)

            def do_GET(self) -> None:
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", self.path):
                    names = hub.repositories.get(found[1])
                    if names is None:
                        return self.answer(404, X_Error_Code="RepoNotFound")
                    siblings = [{"rfilename": name} for name in names]
                    return self.say({"id": found[1], "sha": COMMIT, "siblings": siblings})
                found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", self.path)
                files = hub.repositories.get(found[1], {}) if found else {}
                if not found or found[2] not in files:
                    return self.answer(404, X_Error_Code="EntryNotFound" if files else "RepoNotFound")
                content = files[found[2]]
                self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

            def do_HEAD(self) -> None:
                self.do_GET()

            def create(self, body: bytes) -> None:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                known = name in hub.repositories
                hub.repositories.setdefault(name, {})
                self.say({"url": f"http://{self.headers['Host']}/{name}"}, status=409 if known else 200)

            def preupload(self, body: bytes, repo: str) -> None:
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": name, "uploadMode": self.mode(name), "shouldIgnore": False} for name in names]
                self.say({"files": files})

            def mode(self, name: str) -> str:
                return "lfs" if name.endswith(".safetensors") else "regular"

            def batch(self, body: bytes, repo: str) -> None:
                place = f"http://{self.headers['Host']}/large"
                objects = [
                    {**one, "actions": {"upload": {"href": f"{place}/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self.say({"transfer": "basic", "objects": objects})

            def commit(self, body: bytes, repo: str) -> None:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.repositories[repo][value["path"]] = base64.b64decode(value["content"])
                    if line["key"] == "lfsFile":
                        hub.repositories[repo][value["path"]] = hub.large[value["oid"]]
                self.say({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

            def say(self, content: dict, status: int = 200) -> None:
                self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

            routes: ClassVar[dict[str, Callable]] = {
                "/api/repos/create": create,
                r"/api/models/([^/]+/[^/]+)/preupload/main": preupload,
                r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": batch,
                r"/api/models/([^/]+/[^/]+)/commit/main": commit,
            }

        return Handler
