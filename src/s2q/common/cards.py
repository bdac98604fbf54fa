"""Model cards: the README.md of a model, with its origin and licence in YAML front matter."""

import re
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(?P<yaml>.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)


def read_card(folder: Path) -> dict[str, Any]:
    """Return the front matter of the card in a folder; an empty dict if there is none that can be read."""
    path = folder / CARD
    return front_matter(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}


def front_matter(card: str) -> dict[str, Any]:
    """Return the YAML front matter of a model card, or an empty dict if it has none that can be read."""
    text, _ = split_card(card)
    try:
        content = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def split_card(card: str) -> tuple[str | None, str]:
    """Return the YAML text of the front matter of a model card, None without one, and the Markdown below it."""
    match = _FRONT_MATTER.match(card)
    return (None, card) if match is None else (match["yaml"], card[match.end() :])


def files_and_base(name: str) -> tuple[str | None, str]:
    """Return the files and the base of a model's name "FILE.safetensors@BASE"; no files for another name."""
    files, separator, base = name.rpartition(".safetensors@")
    return (f"{files}.safetensors", base) if separator else (None, name)
