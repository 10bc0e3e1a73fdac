"""A server on this machine, for tests of downloads: it answers each path as the test says, also with byte ranges."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answer each path as the server's ``behaviours`` say, and note (path, Range) of every request."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.server.behaviours[self.path](self)

    def log_message(self, *args: object) -> None:
        pass

    def offset(self) -> int:
        return int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def ranged(self, content: bytes, sent: int | None = None) -> None:
        """Send the range asked for, or its first ``sent`` bytes while promising all of it."""
        start = self.offset()
        body = content[start:]
        stated = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(206 if start else 200, body[:sent], Content_Length=str(len(body)), Content_Range=stated)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []
        self.behaviours: dict[str, Callable[[Handler], None]] = {}

    def url(self, path: str, behaviour: Callable[[Handler], None] | None = None) -> str:
        if behaviour is not None:
            self.behaviours[path] = behaviour
        return f"http://127.0.0.1:{self.server_port}{path}"


@contextmanager
def serving() -> Iterator[Server]:
    """Serve until the block ends."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
