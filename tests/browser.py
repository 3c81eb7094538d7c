"""A real browser without a screen, driven by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

__all__ = ["Browser", "found"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}


def found() -> str | None:
    """A Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab.

    Attributes:
        console: what the page, or the browser about it, complained about.
        requests: addresses that it asked for.
    """

    def __init__(self, width: int = 1280, height: int = 860, *, dark: bool = False, scale: float = 1.0) -> None:
        self._size, self._dark, self._scale = (width, height), dark, scale
        self.console: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Browser:
        path = found()
        assert path is not None
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen([path, *flags], stderr=subprocess.PIPE, text=True)
        try:
            assert self._process.stderr is not None
            address = next(m[1] for line in self._process.stderr if (m := re.search(r"listening on (ws://\S+)", line)))
            self._socket = self._stack.enter_context(
                connect(address, max_size=None, open_timeout=20, ping_interval=None)
            )
            target = self._say("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.send(f"{domain}.enable")
            self.look(*self._size, dark=self._dark, scale=self._scale)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._profile.cleanup()

    def look(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """At a window of this size, in this mode."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        mode = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[mode])

    def goto(self, address: str) -> None:
        """Open a page, and wait until it is there."""
        self.js("window.before = true")
        self.send("Page.navigate", url=address)
        self.wait("!window.before && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """What an expression is in the page."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 15.0) -> Any:
        """Until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression} did not come true; {self.console}"
            time.sleep(0.03)
        return value

    def type(self, text: str) -> None:
        """Write where the focus is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """A key on the keyboard."""
        event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": "\r"} if key == "Enter" else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str) -> None:
        """In the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to the tab, and its answer."""
        return self._say(method, self._session, **params)

    def _say(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        self._socket.send(json.dumps(order))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._hear(message.get("method", ""), message.get("params", {}))

    def _hear(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            said = " ".join(str(arg.get("value", arg.get("description", ""))) for arg in params["args"])
            self.console.append(f"{params['type']}: {said}")
        elif method == "Runtime.exceptionThrown":
            self.console.append(f"exception: {params['exceptionDetails']}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.console.append(
                f"{params['entry']['level']}: {params['entry']['text']} {params['entry'].get('url', '')}"
            )
