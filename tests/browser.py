"""A headless Chromium that tests look at pages with, through the pipe of its DevTools protocol."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
]  # fmt: skip


@contextlib.contextmanager
def opened(user_data_dir: Path):
    """A `Page`; the browser ends with the block."""
    (its_input, to_browser), (from_browser, its_output) = os.pipe(), os.pipe()
    # Chromium wants descriptors 3 and 4, so none of the pipes may lie there already.
    its_input, its_output = (fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (its_input, its_output))

    def connect():
        os.dup2(its_input, 3)
        os.dup2(its_output, 4)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={user_data_dir}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=connect, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(its_input)
    os.close(its_output)
    page = Page(os.fdopen(to_browser, "wb", buffering=0), os.fdopen(from_browser, "rb", buffering=0))
    try:
        page.attach()
        yield page
    finally:
        with contextlib.suppress(OSError, EOFError):
            page.send("Browser.close", session=None)
        process.wait(timeout=20)


class Page:
    def __init__(self, to_browser, from_browser):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.unread, self.count, self.session, self.errors = b"", 0, None, []

    def attach(self):
        targets = self.send("Target.getTargets", session=None)["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", session=None, targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")

    def send(self, method, session="", **params):
        """The answer; errors of the page that come meanwhile are kept in `errors`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self.session
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(answer["params"])

    def _read(self):
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.from_browser], [], [], 120)
            received = self.from_browser.read(1 << 20) if ready else b""
            if not received:
                raise EOFError("the browser has ended, or does not answer")
            self.unread += received
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width=1280, height=900, dark=False):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.evaluate("window.left = true")  # so that a page that is opened again is not taken for the new one
        self.errors.clear()
        self.send("Page.navigate", url=path.as_uri())
        self.wait("!window.left && document.readyState === 'complete'")

    def evaluate(self, expression):
        """The value of an expression of JavaScript, or of what it promises."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            time.sleep(0.05)

    def move_pointer(self, x, y):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
