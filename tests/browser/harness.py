"""A real browser for tests: the Chromium of the system, driven by Playwright.

Tests that use it are skipped without Playwright (`pip install -e '.[dev]'`) or without Chromium (Debian and Ubuntu:
`apt-get install chromium`; `S2Q_CHROMIUM` names another executable). With `CI` set, a missing browser is a failure.
"""

import dataclasses
import functools
import os
import shutil
from contextlib import contextmanager
from importlib import resources, util
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WINDOWS = ((1440, "light"), (390, "dark"), (390, "light"), (1440, "dark"))
LOCAL = {"file", "data", "blob", "about"}
SETTLED = """async () => {
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
  const transitions = document.getAnimations().filter((one) => one instanceof CSSTransition);
  await Promise.allSettled(transitions.map((one) => one.finished));
}"""
OVERFLOW = """() => {
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= wide) return [];
  const right = (element) => element.getBoundingClientRect().right;
  const past = [...document.body.querySelectorAll("*")].filter((element) => right(element) > wide + 1);
  return past.map((element) => `${element.tagName}.${element.className}: ${right(element)} > ${wide}`);
}"""
AXE = """async () => {
  const result = await axe.run(document, {resultTypes: ["violations"]});
  const grave = result.violations.filter((rule) => ["serious", "critical"].includes(rule.impact));
  const told = (node) => `${node.target.join(" ")}: ${[...node.any, ...node.all].map((one) => one.message).join("; ")}`;
  return grave.map((rule) => `${rule.id}: ${rule.nodes.map(told).join(" | ")}`);
}"""


def missing(reason):
    """Skip a test for want of a browser; fail it where one must be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def executable():
    named = os.environ.get("S2Q_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing("no Chromium on the PATH: apt-get install chromium, or set S2Q_CHROMIUM to its executable")
    return found


@functools.cache
def axe_script():
    return (resources.files("axe_playwright_python") / "axe.min.js").read_text()


@dataclasses.dataclass
class Visit:
    """A page in the browser, with the errors of its console and the hosts that it asked."""

    page: object
    errors: list
    requests: list

    def open(self, address):
        self.page.goto(address)
        self.page.wait_for_load_state("load")
        return self.page

    def settle(self):
        """Wait until the page is drawn and nothing fades in or changes its colour."""
        self.page.evaluate(SETTLED)

    def violations(self):
        """Return the serious and critical violations that axe-core finds, each with its elements, frames included."""
        self.settle()
        for frame in self.page.frames:
            if not frame.evaluate("typeof axe === 'object'"):
                frame.evaluate(axe_script())
        return self.page.evaluate(AXE)

    def overflow(self):
        """Return the elements that are wider than the window, or than the frame that they are in."""
        return [element for frame in self.page.frames for element in frame.evaluate(OVERFLOW)]

    def foreign(self, host=None):
        """Return the requests that left the page's own files, or those to another host than the one given."""
        parts = [(address, urlsplit(address)) for address in self.requests]
        return [address for address, url in parts if url.scheme not in LOCAL and url.netloc != host]

    def check(self, host=None):
        """Check the page in narrow and wide windows, light and dark.

        It has logged no error and asked no other host, and fits every window. It is accessible in each colour scheme
        and each width once; axe-core takes half a second.
        """
        for index, (width, scheme) in enumerate(WINDOWS):
            self.page.set_viewport_size({"width": width, "height": 1000})
            self.page.emulate_media(color_scheme=scheme)
            self.settle()
            assert self.overflow() == [], (width, scheme)
            if index < 2:
                assert self.violations() == [], (width, scheme)
        assert self.errors == []
        assert self.foreign(host) == []


@pytest.fixture(scope="module")
def browser():
    """Chromium, once a module: while Playwright runs, its thread can start no other event loop."""
    if util.find_spec("playwright") is None or util.find_spec("axe_playwright_python") is None:
        missing("playwright and axe-playwright-python are not installed: pip install -e '.[dev]'")
    from playwright.sync_api import sync_playwright

    path = executable()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, chromium_sandbox=False, args=["--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def visit(browser):
    """Opens pages: `with visit(width=390, scheme="dark") as visitor: visitor.open(address)`."""

    @contextmanager
    def opened(*, width=1440, height=1000, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        page.set_default_timeout(20_000)
        visitor = Visit(page, [], [])
        page.on("console", lambda message: message.type == "error" and visitor.errors.append(message.text))
        page.on("pageerror", lambda error: visitor.errors.append(str(error)))
        page.on("request", lambda request: visitor.requests.append(request.url))
        try:
            yield visitor
        finally:
            context.close()

    return opened
