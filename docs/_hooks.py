"""Hooks of MkDocs: the README as home page, and links of pages to files outside docs/.

Pages are written for a reader of the repository, where such links work. The site has the linked images and shows the
paths of the other files.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent
HOME = "index.md"
OUTSIDE = "outside"
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Make the ids of headings those of GitHub, which the links have."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the home page and the images outside docs/ that pages show."""
    texts = {page.src_uri: Path(page.abs_src_path).read_text(encoding="utf-8") for page in files.documentation_pages()}
    home = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, HOME, content=_home_links(home)))
    for page, text in texts.items():
        for match in _LINK.finditer(text):
            path = _outside(page, match["target"])
            if match["image"] and path is not None:
                files.append(File.generated(config, f"{OUTSIDE}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links to files outside docs/ by their paths, and of images by those of the site."""

    def replaced(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match["target"])
        if path is None:
            return match[0]
        if match["image"]:
            return f"![{match['text']}]({OUTSIDE}/{path})"
        return match["text"] if path in match["text"] else f"{match['text']} (`{path}`)"

    return _LINK.sub(replaced, markdown)


def _home_links(text: str) -> str:
    """Return the README with links as seen from docs/."""

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" not in target:
            target = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return f"{match['image']}[{match['text']}]({target}{match['anchor'] or ''})"

    return _LINK.sub(replaced, text)


def _outside(page: str, target: str) -> str | None:
    """Return the path from the root of the repository of a target outside docs/; None for others."""
    if "://" in target:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path
