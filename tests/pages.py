"""What tests of pages share: an HTML parser that checks, and a metric as `eval.json` has it."""

import html.parser

VOID = {"meta", "link", "input", "img", "br"}


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order, and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def metric(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high, "definition": "what it means"}
