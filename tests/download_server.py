"""A small server on the loopback that serves a file as badly as a test asks, and its row for the table."""

import contextlib
import http.server
import re
import threading

NAME = "weights.pth"
CONTENT = bytes(range(256)) * 1200  # 307,200 bytes


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content under any path; the fields of Server say how badly."""

    def do_GET(self):
        server, text = self.server, self.headers.get("Range")
        server.ranges.append(text)
        fresh = self.headers.get("If-Range") in (None, server.etag)
        start = int(re.fullmatch(r"bytes=(\d+)-", text)[1]) if text and server.with_ranges and fresh else 0
        if server.statuses:
            return self.answer(server.statuses.pop(0), b"", {})
        if start >= len(server.content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(server.content)}"})
        last = len(server.content) - 1
        headers = {"Content-Range": f"bytes {start + server.shift}-{last}/{last + 1}"} if start else {}
        return self.answer(206 if start else 200, server.content[start:], headers)

    def answer(self, status, body, headers):
        server = self.server
        self.send_response(status)
        for key, value in {"ETag": server.etag, "Content-Type": server.kind, **headers}.items():
            if value:
                self.send_header(key, value)
        if server.with_length:
            self.send_header("Content-Length", str(server.claimed or len(body)))
        self.end_headers()
        if server.cuts and len(body) > server.cuts[0]:
            body = body[: server.cuts.pop(0)]
        half = len(body) // 2
        self.wfile.write(body[:half])
        server.halfway()
        self.wfile.write(body[half:])
        server.served += len(body)

    def log_message(self, *args):
        pass


def table(port, name=NAME, **fields):
    """The content of a files.json with one file on that port, and two presets."""
    row = {"url": f"http://127.0.0.1:{port}/{name}", "sha256": None, "bytes": None}
    row |= {"licence": "MIT", "also_named": [], "what": "a test"}
    return {"files": {name: row | fields}, "presets": {"small": [name], "none": []}}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.kind = CONTENT, '"one"', "application/octet-stream"
        self.with_ranges, self.with_length, self.claimed, self.shift = True, True, None, 0
        # Bytes after which to close, and statuses to answer with: used up one by one.
        self.cuts, self.statuses = [], []
        self.ranges, self.served = [], 0
        self.halfway = lambda: None

    def handle_error(self, request, client_address):
        """Say nothing when a client hangs up, as it does where it refuses a file: tests look at stderr."""

    def table(self, **fields):
        return table(self.server_port, **fields)


@contextlib.contextmanager
def running():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
