"""A browser for tests: Chromium driven through its DevTools protocol over a pair of pipes, with the standard library.

Messages are JSON, each ended by a zero byte (`--remote-debugging-pipe`: Chromium reads descriptor 3, writes 4).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}


def find_chromium() -> str | None:
    """Path of an installed Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """A running Chromium with an empty profile in `folder`; close it when done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        low_in, self._write = os.pipe()
        self._read, low_out = os.pipe()
        to_browser, from_browser = (fcntl.fcntl(low, fcntl.F_DUPFD, 50) for low in (low_in, low_out))
        chromium = find_chromium()
        assert chromium is not None
        command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        redirected = f'exec "$@" 3<&{to_browser} 4>&{from_browser} {to_browser}<&- {from_browser}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", *command],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for descriptor in (low_in, low_out, to_browser, from_browser):
            os.close(descriptor)
        self._last, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []
        self.closed: list[Page] = []
        """Pages to be opened again: to draw one costs less than to start a process for it."""

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; returns its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(60)
            if answer is None:
                raise TimeoutError(f"{method}: no answer from Chromium")
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, an event among `events` too; None when none comes in time."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, *, width: int = 1400, height: int = 900, dark: bool = False, touch: bool = False) -> Page:
        """An empty page, offline, that shares no storage with others that are open or were."""
        page = self.closed.pop() if self.closed else self.new_page()
        page.connect(online=False)
        page.resize(width, height, touch=touch)
        page.media(dark=dark)
        return page

    def new_page(self) -> Page:
        """A page of its own process and context."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(self, self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Performance", "Log"):
            page.send(f"{domain}.enable")
        downloads = str(self.folder / "downloads")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=downloads, browserContextId=context)
        return page

    def close(self) -> None:
        """End Chromium."""
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (RuntimeError, TimeoutError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
        os.close(self._write)
        os.close(self._read)


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol in this page."""
        return self.browser.send(method, self.session, **params)

    def close(self) -> None:
        """Empty the page and forget what it stored, where it was and what it said, for whoever opens it again."""
        origin = self.evaluate("location.protocol === 'file:' ? 'file://' : location.origin")
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")
        self.send("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self.send("Page.resetNavigationHistory")
        self.browser.events = [event for event in self.browser.events if event.get("sessionId") != self.session]
        self.browser.closed.append(self)

    def connect(self, *, online: bool) -> None:
        """Let the page reach the network, or nothing but files."""
        rate = -1 if online else 0
        self.send("Network.emulateNetworkConditions", offline=not online, latency=0, downloadThroughput=rate,
                  uploadThroughput=rate)  # fmt: skip

    def resize(self, width: int, height: int, *, touch: bool = False) -> None:
        """Size of the window in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def media(self, *, dark: bool = False, kind: str = "") -> None:
        """The colour scheme, and `print` or `screen`."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def goto(self, url: str) -> None:
        """Load a URL, or another fragment of the same one, and wait for the explorer."""
        self.send("Page.navigate", url=url)
        self.wait("document.documentElement?.dataset.ready === 'true'")
        self.settle()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds} s: {expression}")
            time.sleep(0.02)

    def settle(self) -> None:
        """Until what was asked for has been drawn."""
        self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        )

    def text(self, selector: str) -> str:
        """Visible text of the first element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector: str) -> int:
        """Number of elements."""
        return self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

    def move(self, x: float, y: float, *, buttons: int = 0, modifiers: int = 0) -> None:
        """Move the mouse."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=buttons, modifiers=modifiers,
                  button="left" if buttons else "none")  # fmt: skip

    def press(self, x: float, y: float, *, down: bool, modifiers: int = 0) -> None:
        """Press or release the left button."""
        self.send("Input.dispatchMouseEvent", type="mousePressed" if down else "mouseReleased", x=x, y=y,
                  button="left", buttons=int(down), clickCount=1, modifiers=modifiers)  # fmt: skip

    def click_at(self, x: float, y: float, *, shift: bool = False) -> None:
        """Click a point of the window."""
        self.move(x, y, modifiers=8 * shift)
        self.press(x, y, down=True, modifiers=8 * shift)
        self.press(x, y, down=False, modifiers=8 * shift)
        self.settle()

    def drag(self, points: list[tuple[float, float]], *, shift: bool = False) -> None:
        """Drag along the points."""
        self.move(*points[0])
        self.press(*points[0], down=True, modifiers=8 * shift)
        for point in points[1:]:
            self.move(*point, buttons=1, modifiers=8 * shift)
        self.press(*points[-1], down=False, modifiers=8 * shift)
        self.settle()

    def click(self, selector: str) -> None:
        """Click an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")
        self.settle()

    def key(self, key: str, *, ctrl: bool = False, shift: bool = False) -> None:
        """Press a key."""
        text = key if len(key) == 1 and not ctrl else "\r" if key == "Enter" else ""
        code = KEYS.get(key, ord(key.upper()[0]))
        params = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 * ctrl + 8 * shift}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **params)
        self.send("Input.dispatchKeyEvent", type="keyUp", **params)
        self.settle()

    def type(self, text: str) -> None:
        """Insert text where the focus is."""
        self.send("Input.insertText", text=text)
        self.settle()

    def cpu(self) -> float:
        """Seconds of CPU that the page's main thread has used."""
        return next(m["value"] for m in self.send("Performance.getMetrics")["metrics"] if m["name"] == "ThreadTime")

    def screenshot(self, path: Path) -> None:
        """Write the window as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def download(self, selector: str) -> Path:
        """Click, and wait for the file that is saved."""
        folder = self.browser.folder / "downloads"
        before = set(folder.glob("*")) if folder.is_dir() else set()
        self.click(selector)
        for _ in range(500):
            new = set(folder.glob("*")) - before if folder.is_dir() else set()
            done = [path for path in new if path.suffix != ".crdownload" and path.stat().st_size]
            if done:
                return done[0]
            self.browser.receive(0.02)
        raise TimeoutError(f"{selector} saved no file")

    def problems(self) -> list[str]:
        """Errors of this page, and requests for anything but files of this machine."""
        found = []
        for event in self.browser.events:
            params = event["params"]
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
                found.append(str(params["args"]))
            elif event["method"] == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "blob:", "data:", "about:")):
                    found.append(f"request for {url}")
        return found
