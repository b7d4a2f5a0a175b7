"""The report of a suite, served to the browser of this machine as it grows: two addresses, no file."""

import time
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from fp4rl.cli.terminal import console
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, UserError

HOST = "127.0.0.1"
_EVERY_S = 3.0  # between two looks at the folder
_REST = 5.0  # how many times as long as the last rendering took, at least
# The page asks whether it is still the newest, and is loaded again only where it is not: its reader keeps the place.
_POLICY = "default-src 'none'; "
_SCRIPT = """<script>
(() => {
  const own = "%s";
  setInterval(async () => {
    try {
      const newest = await (await fetch("/state", {cache: "no-store"})).text();
      if (newest !== own) location.reload();
    } catch (_) { /* the watching has ended; the page stays */ }
  }, %d);
})();
</script>
</body>"""


class LivePage:
    """The newest page of a suite and its digest; rendered again where the suite's files have changed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self._stamp: object = None
        self._next = float("-inf")
        self._page, self._digest = "", ""

    def newest(self) -> tuple[str, str]:
        """Return page and digest."""
        with self._lock:
            if (began := time.monotonic()) >= self._next:
                if (stamp := _stamp(self._folder)) != self._stamp:
                    self._stamp = stamp
                    self._page = _rendered(self._folder)
                    self._digest = sha256(self._page.encode()).hexdigest()[:16]
                ended = time.monotonic()
                self._next = ended + max(_EVERY_S, _REST * (ended - began))
            return self._page, self._digest


def live(page: str, digest: str) -> bytes:
    """Return the page with the script that asks for newer ones, and leave to ask its own address."""
    page = page.replace(_POLICY, f"{_POLICY}connect-src 'self'; ", 1)
    head, end, tail = page.rpartition("</body>")
    return (head + _SCRIPT % (digest, 1000 * _EVERY_S) + tail if end else page).encode()


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the report of `folder` on the loopback address; it answers to its own names alone.

    Raises NotFoundError without the extra `report`, InvalidValueError for a port that is taken.
    """
    if find_spec("jinja2") is None or find_spec("plotly") is None:
        raise NotFoundError("--html needs Jinja and Plotly: pip install 'fp4rl[report]'")
    page = LivePage(folder)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content, digest = page.newest() if self._ours() else ("", "")
            if not self._ours():
                self._send(403, b"this server answers to 127.0.0.1 alone\n", "text/plain")
            elif self.path == "/":
                self._send(200, live(content, digest), "text/html")
            elif self.path == "/state":
                self._send(200, digest.encode(), "text/plain")
            else:
                self._send(404, b"only / is served\n", "text/plain")

        def _ours(self) -> bool:
            """Return whether the request names this machine: a name of another that leads here is a page's trick."""
            return self.headers.get("Host") in (f"{HOST}:{made.server_port}", f"localhost:{made.server_port}")

        def _send(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    try:
        made = ThreadingHTTPServer((HOST, port), Answer)
    except OSError as error:
        raise InvalidValueError(f"--port {port}: {error.strerror}; 0 takes a free one") from None
    made.daemon_threads = True
    return made


def serve(folder: Path, port: int) -> None:
    """Show the report of `folder` at a loopback address until Ctrl-C."""
    with server(folder, port) as serving:
        address = f"http://{HOST}:{serving.server_port}/"
        console().print(
            f"{address} shows the report of {folder}, on this machine alone; Ctrl-C ends it", soft_wrap=True
        )
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            console().print("ended; `fp4rl report` writes the page as a file")


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether the report may have changed: the suite, and of every run where it is and its result."""
    names = ("suite.yaml", "*/result.json", "*/heartbeat.json", "*/spec.yaml", "../ledger.db")
    files = sorted(file for name in names for file in folder.glob(name))
    stats = ((str(file), file.stat()) for file in files if file.is_file())
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _rendered(folder: Path) -> str:
    from fp4rl.lab.report.collect import collect
    from fp4rl.lab.report.html import render

    try:
        return render(collect(folder))
    except (UserError, CheckFailed, OSError) as error:
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f"content=\"{_POLICY}script-src 'unsafe-inline'\"><title>fp4rl watch</title></head><body>"
            f"<p>{escape(str(error))}</p><p>This page loads itself again when there is a report.</p></body></html>"
        )
