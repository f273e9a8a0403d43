"""Open every page of the built site in headless Chromium, from disk and without a network, and print what is wrong.

Each page is opened at two widths, light and dark. The check fails on horizontal overflow, LaTeX shown as text, links or
anchors that lead nowhere, missing images, and errors in the browser's console. Usage: ``check_site.py docs/_build/html``.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

WIDTHS = (1280, 390)
THEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS = 30
# After how many pages a line is printed.
PROGRESS = 50

# What one page shows in its present width and theme. Code blocks may hold LaTeX, and may scroll inside their own box.
LOOK = r"""
const windowWidth = document.documentElement.clientWidth;
// A theme may clip what is too wide, so each element is measured. A box that scrolls by itself holds what it likes.
const article = document.querySelector("article") || document.body;
const scrolls = e => e !== article && article.contains(e) && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
const beyond = [...article.querySelectorAll("*")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 1 && box.height > 1 && box.right > windowWidth + 1 && !scrolls(e.parentElement);
});
const widest = beyond.length ? ` (<${beyond[0].localName} class="${beyond[0].getAttribute("class") || ""}">)` : "";
const right = Math.max(document.documentElement.scrollWidth, ...beyond.map(e => e.getBoundingClientRect().right));
const wide = Math.round(right - windowWidth);
const text = [];
const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.parentElement.closest("code, pre, script, style, annotation")) text.push(node.data);
}
const latex = text.join(" ").match(/\\\(|\\\[|\$\$|\\[A-Za-z]{2,}/);
const images = [...document.images].filter(i => i.loading = "eager");
const settled = Promise.all(images.map(i => i.decode().then(() => null, () => i.src)));
settled.then(missing => arguments[0]({wide, widest, latex: latex && latex[0], missing: missing.filter(Boolean)}));
"""
LINKS = r"""
return {links: [...document.links].map(a => a.href), anchors: [...document.querySelectorAll("[id],a[name]")].map(e => e.id || e.name)};
"""


class Browser:
    """A session of headless Chromium, spoken to by the WebDriver protocol."""

    def __init__(self, chromium: str, driver: str) -> None:
        self.process = subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            self.url = f"http://127.0.0.1:{self._port()}/session"
            options = {
                "binary": chromium,
                # No name resolves, so that nothing comes from a network. Containers run as root, where the sandbox cannot start.
                "args": [
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-dev-shm-usage",
                    "--host-resolver-rules=MAP * ~NOTFOUND",
                ],
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "SEVERE"}}
            session = self._post("", {"capabilities": {"alwaysMatch": wanted}})
            self.url += f"/{session['sessionId']}"
        except BaseException:
            self.process.terminate()
            raise

    def _port(self) -> int:
        assert self.process.stdout is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and (line := self.process.stdout.readline()):
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found.group(1))
        raise SystemExit("chromedriver did not start")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the browser refused {path}: {error.read().decode()[:500]}") from error

    def command(self, name: str, **parameters: Any) -> None:
        self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def show(self, width: int, theme: str) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def open(self, page: Path) -> None:
        self._post("/url", {"url": page.as_uri()})

    def ask(self, script: str) -> Any:
        return self._post("/execute/sync", {"script": script, "args": []})

    def ask_later(self, script: str) -> Any:
        return self._post("/execute/async", {"script": script, "args": []})

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def close(self) -> None:
        request = urllib.request.Request(self.url, method="DELETE")
        try:
            urllib.request.urlopen(request, timeout=30).close()
        finally:
            self.process.terminate()


def broken_links(pages: dict[Path, Any]) -> list[str]:
    """Return the links to files that do not exist, and to anchors that their page lacks."""
    faults = []
    for page, content in pages.items():
        for link in sorted(set(content["links"])):
            address, anchor = urldefrag(link)
            if urlparse(address).scheme != "file":
                continue
            target = Path(unquote(urlparse(address).path))
            if not target.is_file():
                faults.append(f"{page}: link to a file that does not exist: {target}")
            elif anchor and target in pages and unquote(anchor) not in pages[target]["anchors"]:
                faults.append(f"{page}: link to an anchor that does not exist: {target.name}#{anchor}")
    return faults


def check(site: Path, browser: Browser) -> list[str]:
    """Print every fault of the site, a sentence each, and return them all."""
    faults: list[str] = []
    pages: dict[Path, Any] = {}
    every = sorted(site.rglob("*.html"))
    for number, page in enumerate(every, 1):
        found = faults_of(browser, page, str(page.relative_to(site)))
        pages[page] = browser.ask(LINKS)
        faults += found
        for fault in found:
            print(fault, flush=True)
        if number % PROGRESS == 0 or number == len(every):
            print(f"{number} of {len(every)} pages, each in {len(WIDTHS) * len(THEMES)} ways", flush=True)
    broken = broken_links(pages)
    for fault in broken:
        print(fault)
    return faults + broken


def faults_of(browser: Browser, page: Path, name: str) -> list[str]:
    """Return the faults of one page. It is loaded once, and then shown at each width in each theme."""
    browser.show(WIDTHS[0], THEMES[0])
    browser.open(page)
    faults = []
    for theme in THEMES:
        for width in WIDTHS:
            where = f"{name} ({width} pixels, {theme})"
            browser.show(width, theme)
            seen = browser.ask_later(LOOK)
            if seen["wide"] > 0:
                faults.append(f"{where}: {seen['wide']} pixels wider than the window{seen['widest']}")
            if seen["latex"]:
                faults.append(f"{where}: LaTeX shown as text: {seen['latex']}")
            faults += [f"{where}: image missing: {image}" for image in seen["missing"]]
    return faults + [f"{name}: console error: {message}" for message in browser.errors()]


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    chromium = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise SystemExit("`make docs-check` needs Chromium: run `apt-get install chromium chromium-driver`.")
    if not (site / "index.html").is_file():
        raise SystemExit(f"{site} holds no built site: run `make docs` or `make gallery` first.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the browser ends with this program
    browser = Browser(chromium, driver)
    try:
        faults = check(site, browser)
    finally:
        browser.close()
    if not faults:
        print("no fault found")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
