"""A Hub on this computer, for tests: the real clients push to it and load from it without a network.

It answers what huggingface_hub, transformers and datasets ask (`hub_routes`); `fail_at` breaks the n-th request.
`python tests/hub_server.py` serves one by itself, and prints how to reach it.
"""

import contextlib
import io
import json
import re
import shutil
import socket
import tempfile
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import ROUTES, Answer, Call, Hub, Refused

# What the Hub says with a status that a test breaks a request with.
MESSAGES = {
    401: "Invalid credentials in Authorization header",
    402: "Payment required: Spaces of this kind need a subscription",
    403: "Private repository storage limit reached, please upgrade your plan to increase your private storage limit",
    412: "A commit has happened since. Please refresh and try again.",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
    507: "Insufficient Storage",
}


@dataclass
class Request:
    """A request that came; `status` is 0 where the connection was closed instead of an answer."""

    method: str
    path: str
    length: int
    token: str | None
    status: int = 0


class HubServer(Hub):
    """The Hub at an address: `with HubServer() as hub:`, or `start()` and `stop()`; `hub.url` is what `HF_ENDPOINT` takes."""

    port = 0  # any that is free

    def reset(self):
        """Forget every repo, request and fault."""
        with self.lock:
            super().reset()
            self.requests: list[Request] = []
            self.faults: list[dict] = []

    def fail_at(self, n, how, *, method="", path="", times=1):
        """Break the n-th request from now (the next is 1), and `times` in all, of those with this in their method and path.

        `how` is a status, answered without doing anything; "drop": the connection closes and nothing was done;
        or "lose": it was done, and the connection closes before the answer.
        """
        self.faults.append({"next": n, "how": how, "method": method, "path": path, "times": times})

    def fault(self, request):
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault["method"] in request.method and fault["path"] in request.path:
                    fault["next"] -= 1
                    if -fault["times"] < fault["next"] <= 0:
                        return fault["how"]
        return None

    @contextlib.contextmanager
    def gone(self):
        """The network is gone: connections are refused."""
        self.close()
        with socket.socket() as place:  # keeps the address for us meanwhile
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", self.port))
            try:
                yield
            finally:
                place.close()
                self.start()

    def start(self):
        self.connections = set()
        self.listener = Listener(("127.0.0.1", self.port), type("Handler", (Handler,), {"hub": self}))
        self.port = self.listener.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        # Large files lie on another host, as they do on the Hub: clients take no token there.
        self.storage_url = f"http://localhost:{self.port}"
        threading.Thread(target=self.listener.serve_forever, args=[0.02], daemon=True).start()
        return self

    def close(self):
        self.listener.shutdown()
        self.listener.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self):
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that went away is nothing to report."""


class Handler(BaseHTTPRequestHandler):
    """A connection: reads a request, finds its route, writes the answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer leave together
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def handle_request(self):
        length, url = int(self.headers.get("Content-Length", 0)), urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, self.path, length, token)
        with tempfile.SpooledTemporaryFile(2**24) as body:
            while left := length - body.tell():
                if not (piece := self.rfile.read(min(left, 2**20))):
                    raise ConnectionError("the client went away")
                body.write(piece)
            body.seek(0)
            how = self.hub.fault(request)
            try:
                if how == "drop":
                    return self.hang_up()
                if isinstance(how, int):
                    raise Refused(how, MESSAGES.get(how, HTTPStatus(how).phrase))
                if token and token not in self.hub.tokens:
                    raise Refused(401, "Invalid credentials in Authorization header")
                for methods, pattern, answer in ROUTES:
                    if self.command in methods and (found := pattern.match(url.path)):
                        names = {name: unquote(value or "") for name, value in found.groupdict().items()}
                        call = Call(self.command, self.hub.tokens.get(token), names, parse_qs(url.query), body)
                        with self.hub.lock:
                            said = answer(self.hub, call)
                        break
                else:
                    raise Refused(404, "Sorry, we can't find the page you are looking for.")
            except Refused as refusal:
                said = Answer(refusal.body, refusal.headers, refusal.status)
        if how == "lose":
            return self.hang_up()
        said = said if isinstance(said, Answer) else Answer(said)
        request.status = said.status
        self.send(said.status, said.content, said.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status, content, headers):
        if not isinstance(content, bytes | Path):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json; charset=utf-8"} | headers
        start, end = 0, content.stat().st_size if isinstance(content, Path) else len(content)
        if status == 200 and (asked := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))):
            size, start, end = end, int(asked[1]), min(int(asked[2] or end) + 1, end)
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
            if start >= size:
                status, start, end, headers = 416, 0, 0, {"Content-Range": f"bytes */{size}"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": end - start, "X-Request-Id": "test"}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
                file.seek(start)
                while left := end - file.tell():
                    self.wfile.write(file.read(min(left, 2**20)))


if __name__ == "__main__":
    with HubServer() as server:
        print(f"HF_ENDPOINT={server.url} HF_TOKEN=hf_me HF_HUB_DISABLE_XET=1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
