"""A page in headless Chromium, over its debugging pipe: what it logs, asks the network for, and how it lies."""

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")

# Texts whose colour differs too little from what is behind them (WCAG 2.1, 1.4.3), and how far the page is too wide.
LOOK = """(() => {
  const channel = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const pale = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const [text, element] = [walker.currentNode.textContent.trim(), walker.currentNode.parentElement];
    if (!text || !element.checkVisibility() || element.closest("script")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) pale.push(text.slice(0, 40));
  }
  const root = document.documentElement;
  return { pale, overflow: root.scrollWidth - root.clientWidth, height: root.scrollHeight,
           background: getComputedStyle(document.body).backgroundColor,
           broken: [...document.images].filter((i) => !i.complete || !i.naturalWidth).length };
})()"""


@dataclass(frozen=True)
class Seen:
    """What a page did: lines of its console, addresses that it asked for beside its own, and LOOK."""

    console: list[str]
    requests: list[str]
    pale: list[str]
    overflow: int
    background: str
    broken: int


class Browser:
    """Chromium with one page; messages are JSON, each ended by a zero byte."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (child_in, self.to), (self.out, child_out) = os.pipe(), os.pipe()

        def place() -> None:
            # By way of higher numbers: the pipes may be 3 and 4 themselves.
            high = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (child_in, child_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, close_fds=False, preexec_fn=place
        )
        os.close(child_in)
        os.close(child_out)
        self.buffer, self.number, self.events = b"", 0, list[dict[str, Any]]()
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.out, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def look(self, path: Path, width: int, dark: bool = False) -> Seen:
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        wait = (
            "Promise.all([...document.images].map((i) => { i.loading = 'eager'; return i.decode().catch(() => 0); }))"
        )
        self.send("Runtime.evaluate", expression=wait, awaitPromise=True)
        found = self.send("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        methods = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        console = [json.dumps(event["params"]) for event in self.events if event.get("method") in methods]
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        requests = [url for url in asked if not url.startswith("data:") and url != path.as_uri()]
        return Seen(console, requests, found["pale"], found["overflow"], found["background"], found["broken"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.out)
        self.folder.cleanup()
