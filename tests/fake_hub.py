"""A small Hugging Face hub on loopback, for tests and by hand: python tests/fake_hub.py FOLDER

FOLDER/OWNER/NAME/FILE is served as dataset OWNER/NAME. Like the real one, it answers for a file with a redirect to
another host, where the bytes are. By hand: HF_ENDPOINT=http://127.0.0.1:PORT python prepare.py --task climbmix
"""

import hashlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves a folder. faults: file name -> faults, one for each GET of its bytes (or HEAD, for a status of "head").

    A fault is "cut" (the connection breaks in the middle), "short" (complete, but half as long as announced), a status,
    or ("head", status).
    """

    daemon_threads = True

    def __init__(self, folder, faults=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.faults, self.seen = Path(folder), faults or {}, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        """Clients may hang up."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": 0} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def fault(self, name, head):
        """The next fault that is due for a file, or None."""
        due = self.server.faults.get(name, [])
        if due and (isinstance(due[0], tuple) == head):
            return due.pop(0)[1] if head else due.pop(0)

    def do_HEAD(self):
        host, name = self.headers["Host"], Path(self.path).name
        self.server.seen.append((self.command, host.split(":")[0], name, self.headers))
        _, kind, owner, dataset, verb, revision, *_ = self.path.split("/") + [""] * 6
        path = self.server.folder / owner / dataset / name
        if (kind, verb) != ("datasets", "resolve") or revision not in ("main", COMMIT) or not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        if fault := self.fault(name, head=True):
            return self.answer(fault, Retry_After=0)
        self.answer(
            302,
            Location=f"http://localhost:{self.server.server_port}/{owner}/{dataset}/{name}",
            X_Repo_Commit=COMMIT,
            X_Linked_Etag=f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"',
            X_Linked_Size=path.stat().st_size,
        )

    def do_GET(self):
        if self.path.startswith("/datasets/"):
            return self.do_HEAD()
        path = self.server.folder / self.path.lstrip("/")
        self.server.seen.append((self.command, "localhost", path.name, self.headers))
        fault = self.fault(path.name, head=False)
        if isinstance(fault, int):
            return self.answer(fault, Retry_After=0)
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = content[start:] if fault != "short" else content[start : len(content) // 2]
        span = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.answer(206 if start else 200, Content_Length=len(rest), **span)
        self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else rest)
        self.close_connection = fault == "cut"


def write_parquet(path, texts):
    """A parquet file with the column "text", in row groups of 100."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)


if __name__ == "__main__":
    hub = FakeHub(sys.argv[1], port=8123)
    print(hub.url)
    threading.Event().wait()
