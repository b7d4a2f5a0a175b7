"""Opens an HTML file in headless Chromium, over the DevTools protocol on a pipe: no package, no port, no network.

`seen(file, width, dark=True)` says what a person would: what the console and the network showed, how wide the page is
beyond the window, and a picture of it.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", "about:blank"),
)
_PATIENCE_S, _SETTLE_S = 60.0, 0.6


@dataclass
class Seen:
    """What was seen of a page. `faults`: errors and warnings of the console; `requests`: all but the file's own."""

    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    width: int = 0
    spill: int = 0
    value: Any = None
    png: bytes = b""


def seen(
    file: Path, width: int, *, dark: bool = False, height: int = 900, ask: str = "null", whole: bool = False
) -> Seen:
    """Open `file` in a window of `width` pixels; `ask`, JavaScript, is evaluated once it is drawn (`Seen.value`).

    `whole`: the picture shows the whole page, not the window alone.
    """
    found = Seen()
    with _browser() as browser:
        page = browser.page()
        for domain in ("Page", "Runtime", "Network", "Log"):
            page(f"{domain}.enable")
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page("Emulation.setEmulatedMedia", features=[scheme])
        page("Page.navigate", url=file.resolve().as_uri())
        browser.wait_for("Page.loadEventFired")
        page("Runtime.evaluate", expression="window.drawn", awaitPromise=True)
        time.sleep(_SETTLE_S)
        evaluated = page("Runtime.evaluate", expression=ask, returnByValue=True, awaitPromise=True)
        found.value = evaluated["result"].get("value", evaluated["result"].get("description"))
        sizes = "[innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth]"
        found.width, found.spill = page("Runtime.evaluate", expression=sizes, returnByValue=True)["result"]["value"]
        shot = page("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        found.png = base64.b64decode(shot["data"])
        _sort(browser.events, found, file.resolve().as_uri())
    return found


def _sort(events: list[dict[str, Any]], found: Seen, own: str) -> None:
    for event in events:
        told = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                found.faults.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                found.faults.append(" ".join(str(part.get("value")) for part in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                found.faults.append(told["entry"]["text"])
            case "Network.requestWillBeSent" if told["request"]["url"] != own:
                if not told["request"]["url"].startswith(("data:", "blob:")):
                    found.requests.append(told["request"]["url"])


class _Browser:
    """A browser on a pipe: messages are JSON, each followed by a zero byte."""

    def __init__(self, into: int, out: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._into, self._out, self._rest, self._number = into, out, b"", 0
        self._session: str | None = None

    def page(self) -> Any:
        """Open a tab; return a function that calls its methods."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return self._call

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def wait_for(self, method: str) -> None:
        """Read events until one of `method` came."""
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._out, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium ended")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def _browser() -> Iterator[_Browser]:
    if BINARY is None:
        raise RuntimeError("no Chromium on this machine")
    reads, into = os.pipe()
    out, writes = os.pipe()

    def at_three_and_four() -> None:  # where Chromium expects its pipe
        first, second = os.dup(reads), os.dup(writes)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BINARY, f"--user-data-dir={profile}", *_FLAGS]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, preexec_fn=at_three_and_four, close_fds=False, **quiet)
        os.close(reads)
        os.close(writes)
        try:
            yield _Browser(into, out)
        finally:
            process.kill()
            process.wait()
            os.close(into)
            os.close(out)
