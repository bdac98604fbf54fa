"""What tests of pages share: an HTML parser that checks, a metric of `eval.json`, attention of `report.json`."""

import html.parser

import torch

from s2q.core.tokens import TokenGrid
from s2q.distillation.attention_profile import AttentionProfile, ImportanceMap

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


def attention(*, top=8.0, tokens=20, grid=(3, 2, 2), sample="prompt 1, step 4, branch 0"):
    """The record of a block, one of whose tokens receives `top` times as much as any other."""
    profile, sums = AttentionProfile(), torch.ones(1, tokens)
    sums[0, 0] = top
    profile.add(sums, text=slice(12, 20))
    if grid:
        frames, height, width = grid
        grid = TokenGrid(frames=frames, height=height, width=width)
        profile.map = ImportanceMap.of(sums[0, : grid.tokens], grid, sample=sample)
    return profile.to_dict()
