"""Parts of the inline SVG charts: frame, grid lines of decades, labels, embedded pictures.

Colours come from the page's style sheet, so that charts follow light and dark.
"""

import base64
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 48


def decade(exponent: int, y: float) -> str:
    """Return a grid line at a power of ten, with its label."""
    shown = str(exponent).replace("-", "−")
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">'
        f'10<tspan dy="-5" font-size="11">{shown}</tspan></text>'
    )


def label_text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    """Return a text, escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(label: str, height: float, parts: Sequence[str]) -> Markup:
    """Join parts, in which every text is escaped, to an SVG image with a label for screen readers."""
    body = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def data_url(kind: str, data: bytes) -> str:
    """Return a file's bytes, of a media type such as "video/mp4", as a URL that contains them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
