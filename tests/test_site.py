"""The site of the documentation has every page and every public name, and asks no other host for anything."""

import functools
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

import s2q

ROOT = Path(__file__).parent.parent
OTHER_HOST = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=["'](?:https?:)?//(?!127\.)[^"']*""")
UNREADABLE = """(elements) => {
  const wide = (element) => element.scrollWidth >= element.clientWidth + 16;  // the margin
  const small = (element) => parseFloat(getComputedStyle(element).fontSize) < 12;
  return elements.filter((element) => wide(element) || small(element)).map((element) => element.outerHTML);
}"""


def pages_of(nav):
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from pages_of(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages_of(nav)) == sorted(pages | {"index.md"})


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    assert set(s2q.__all__) - {"__version__"} <= documented


def test_every_page_is_linked_from_the_readme_which_is_short():
    readme = (ROOT / "README.md").read_text()
    unlinked = {path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in readme}
    assert unlinked <= {"observations.md"}  # from the results
    assert len([line for line in readme.splitlines() if not line.startswith("|")]) <= 60


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_is_built_without_a_warning_and_needs_no_other_host(site):
    found = {path.relative_to(site).as_posix(): OTHER_HOST.findall(path.read_text()) for path in site.rglob("*.html")}
    assert {"index.html", "quickstart.html", "api.html", "models/wan.html"} <= found.keys()
    assert found == dict.fromkeys(found, [])
    assert not (site / "_hooks.py").exists()


def test_the_home_page_is_the_readme_with_links_of_the_site(site):
    home = (site / "index.html").read_text()
    assert 'href="choose.html"' in home
    assert "docs/choose" not in home
    assert home.count("CITATION.cff") == 1
    shown = re.findall(r'<img[^>]*src="([^"]*)"', home + (site / "models.html").read_text())
    assert any(source.startswith("outside/") for source in shown)
    assert all((site / source).is_file() for source in shown)


def test_the_reference_has_signatures_and_docstrings(site):
    page = (site / "api.html").read_text()
    assert "Quantize a text-to-video pipeline into a checkpoint" in page
    assert page.count('class="doc doc-heading"') >= len(s2q.__all__) - 1


@pytest.fixture(scope="module")
def served_site(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index", "models"])
def test_pages_log_no_error_ask_no_other_host_fit_the_window_and_are_accessible(served_site, visit, name):
    with visit() as visitor:
        visitor.open(f"http://{served_site}/{name}.html")
        visitor.check(served_site)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "light"), (390, "dark")])
def test_a_word_of_the_reference_is_found_and_its_results_are_readable(served_site, visit, width, scheme):
    with visit(width=width, scheme=scheme) as visitor:
        page = visitor.open(f"http://{served_site}/index.html")
        page.locator(".md-search__input" if width > 1000 else "label.md-header__button[for=__search]").click()
        page.get_by_text("Type to start searching").wait_for()  # until then, the theme loses what is typed
        page.locator(".md-search__input").press_sequentially("quantize")  # it listens to keys
        results = page.locator(".md-search-result__item a")
        results.first.wait_for()
        assert page.locator('.md-search-result__item a[href*="api.html"]').count() > 0
        assert visitor.overflow() == []
        assert visitor.violations() == []
        box = results.first.bounding_box()
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= width
        unreadable = page.locator(".md-search-result__article > :is(h1, h2, p)").evaluate_all(UNREADABLE)
        assert unreadable == []
        results.first.click()
        page.locator(".md-content mark").first.wait_for()  # the page of the result, with the word marked
        assert visitor.overflow() == []
        assert visitor.errors == []
