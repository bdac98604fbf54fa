"""Model cards: the README.md of a model, with its origin and licence in YAML front matter."""

from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"


def read_card(folder: Path) -> dict[str, Any]:
    """Return the front matter of the card in a folder; an empty dict if there is none that can be read."""
    path = folder / CARD
    return front_matter(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}


def front_matter(card: str) -> dict[str, Any]:
    """Return the YAML front matter of a model card, or an empty dict if it has none that can be read."""
    if not card.startswith("---\n"):
        return {}
    try:
        content = yaml.safe_load(card[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
