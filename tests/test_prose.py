"""Pages, docstrings, help texts and error messages use the field's words: a list of phrases that they do not contain.

A phrase is on the list only if a regular expression recognises it without false alarms; each has its remedy.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REFUSED = {
    r"\bas (?:it is|they are|it was|they were)(?=\s*(?:[.,;:()|]|$|(?:unless|and|or|in|by|for)\b))": "unchanged",
    r"\b(?:go|goes|going|went|gone) (?:round|around)\b": "bypass",
    r"\b(?:is|are) said\b|\bsays? so\b": "is listed, logs a warning, the report has it",
    r"\bbut for\b": "except",
    r"\b(?:stand|stands|stood) (?:for|in|still|before|beside|behind)\b": "represents, replaces, is fixed, is before",
    r"\b(?:take|takes|taken|taking) apart\b|\bset aside\b|\btaken over\b": "split, offload, reused",
    r"\bwhom\b": "who",
    r"\b(?:come|comes|came) into being\b": "is created",
    r"\bof which\b": "whose",
    r"\bscale an? (?:output|input|token|weight|channel|row|group)\b": "per-channel scales, per-token scales",
    r"\bas (?:they|it) comes?\b(?! in\b)": "dynamic, at once",
    r"\b(?:go|goes|going|went|gone) on\b": "resume, continue",
}
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "gpu-queue.md", *(ROOT / "docs").glob("*.md")]
)
MODULES = sorted([*(ROOT / "src" / "s2q").rglob("*.py"), *(ROOT / "training").rglob("*.py")])
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))
TEMPLATES = sorted((ROOT / "src" / "s2q").rglob("*.j2"))


def texts(path):
    """The text of a page or template, or the strings of a module."""
    if path.suffix != ".py":
        return [path.read_text()]
    tree = ast.parse(path.read_text())
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def headlines(path):
    """First lines of the docstrings of a module, its classes, functions and documented constants."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Expr)]
    strings = [node.value.value for node in nodes if isinstance(node.value, ast.Constant)]
    return [string.strip().partition("\n")[0] for string in strings if isinstance(string, str)]


def refused_phrases(text):
    """Refused phrases of a text with their remedies."""
    line = " ".join(text.split())
    return [
        f"“{line[max(0, match.start() - 40) : match.end() + 40]}”: {remedy}"
        for pattern, remedy in REFUSED.items()
        for match in re.finditer(pattern, line, flags=re.IGNORECASE)
    ]


def by_file(paths, findings):
    """The findings of each file that has some."""
    return {str(path.relative_to(ROOT)): found for path in paths if (found := findings(path))}


def test_prose_has_no_refused_phrase():
    def findings(path):
        return [phrase for text in texts(path) for phrase in refused_phrases(text)]

    assert by_file([*PAGES, *TEMPLATES, *MODULES, *SCRIPTS], findings) == {}


def test_headlines_name_the_thing():
    def findings(path):
        return [line for line in headlines(path) if re.match(r"(?:What|How|Whom|Which|Where)\b", line)]

    assert by_file(MODULES, findings) == {}


@pytest.mark.parametrize(
    "sentence",
    [
        "The other linears stay as they are.",
        "The branch goes round the quantizer.",
        "What is left out is said.",
        "Everything but for the adaLN linears is quantized.",
        "A code stands for itself.",
        "The token is taken apart.",
        "Whom to tell",
        "How it came into being.",
        "40 samples, of which half are unconditional.",
        "Weights have one scale an output channel.",
        "Scales are computed as they come.",
        "A killed run goes on where it was.",
    ],
)
def test_each_refused_phrase_is_recognised(sentence):
    assert len(refused_phrases(sentence)) == 1


def test_plain_sentences_are_not_refused():
    text = """
    Codes are multiplied as they are read. Weights have per-channel scales. The branch bypasses the quantizer.
    a red circle standing still on a grey background
    """
    assert refused_phrases(text) == []
