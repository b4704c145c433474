"""A headless Chromium and one page in it, driven through DevTools with real mouse, touch and key events."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

CHROMIUM = shutil.which("chromium")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --disable-default-apps --disable-extensions --mute-audio --hide-scrollbars"
).split()
# DevTools speaks on file descriptors 3 and 4, which Popen alone cannot name.
_START = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_SECONDS = 30


class Page:
    """One open page. `requests` are the URLs that it asked for, `complaints` what it wrote to the console or threw."""

    def __init__(self, path: Path, profile: Path, width: int = 1280, height: int = 800, phone: bool = False) -> None:
        assert CHROMIUM
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._answers: dict[int, dict] = {}
        self._last, self._session, self._rest = 0, "", b""
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        command = [CHROMIUM, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = ours_out, ours_in
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.send(f"{domain}.enable")
            metrics = dict(width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
            self.send("Emulation.setDeviceMetricsOverride", **metrics)
            if phone:
                self.send("Emulation.setTouchEmulationEnabled", enabled=True)
            self.send("Page.navigate", url=path.resolve().as_uri())
            self.until("document.readyState === 'complete' && document.getElementById('azimuth').textContent !== ''")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def send(self, method: str, **parameters: object) -> dict:
        """One command; its answer. What happens meanwhile is noted."""
        self._last += 1
        message: dict[str, object] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while self._last not in self._answers:
            self._receive()
        answer = self._answers.pop(self._last)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> None:
        while b"\0" not in self._rest:
            more = os.read(self._in, 1 << 20)
            assert more, "Chromium has ended"
            self._rest += more
        text, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(text)
        if "id" in message:
            self._answers[message["id"]] = message
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"]))

    def value(self, expression: str) -> object:
        """What a JavaScript expression yields."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def drag(self, across: int, down: int, button: str = "left") -> None:
        """From the middle of the view, in a few steps, as a mouse does."""
        x, y = self._middle()
        held = {"left": 1, "right": 2}[button]
        move = dict(button=button, buttons=held)
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, clickCount=1, **move)
        for part in (0.25, 0.5, 0.75, 1):
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + part * across, y=y + part * down, **move)
        where = dict(x=x + across, y=y + down, clickCount=1, button=button, buttons=0)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def swipe(self, across: int, down: int) -> None:
        """The same with a finger."""
        x, y = self._middle()
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=x, y=y)])
        for part in (0.25, 0.5, 0.75, 1):
            points = [dict(x=x + part * across, y=y + part * down)]
            self.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=points)
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _middle(self) -> tuple[float, float]:
        box = "document.getElementById('view').getBoundingClientRect()"
        x, y = self.value(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        return x, y

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def click(self, id: str) -> None:
        self.value(f"document.getElementById('{id}').click()")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
