"""The chart of error against minutes: everything inside, labels apart, stairs under all points."""

import itertools
import re

from s2q.report.cost_chart import OURS, PEER, RIVAL, Point, cost_chart

POINTS = [
    Point(label=f"method-{i}", seconds=0.5 * 3**i, error=0.05 / 2 ** (i % 3), kind=(OURS, RIVAL, PEER)[i % 3])
    for i in range(7)
]
CLOSE = [Point(label=f"close-{i}", seconds=20 + i, error=0.02 + i / 1000, kind=RIVAL) for i in range(6)]
LABEL = re.compile(r'<text class="label [a-z ]+" x="([\d.]+)" y="([\d.]+)" text-anchor="start">([^<]+)<')


def test_labels_of_close_points_do_not_meet_and_stay_inside():
    texts = [(float(x), float(y), name) for x, y, name in LABEL.findall(str(cost_chart([("W4A8", POINTS + CLOSE)])))]
    assert {name for _, _, name in texts} == {point.label for point in POINTS + CLOSE}
    boxes = [(x, y - 12, x + 7 * len(name), y) for x, y, name in texts]
    assert all(left > 60 and right < 580 and top > 20 and bottom < 360 for left, top, right, bottom in boxes)
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_stairs_go_down_through_the_least_errors():
    chart = str(cost_chart([("W4A8", POINTS)]))
    line = re.search(r'class="front" points="([^"]+)"', chart)[1]
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert places == sorted(places)
    assert len({down for _, down in places}) == 3, "0.05, 0.025 and 0.0125"


def test_a_hollow_point_is_explained_and_nothing_without_a_value_is_drawn():
    weights_only = Point(label="<q4>", seconds=1, error=0.1, kind=PEER, hollow=True)
    chart = str(cost_chart([("W4A8", [weights_only, Point(label="free", seconds=0, error=0.1, kind=PEER)])]))
    assert "&lt;q4&gt;" in chart
    assert "16-bit activations" in chart
    assert "free" not in chart
    assert cost_chart([("W4A8", [Point(label="exact", seconds=1, error=0.0, kind=OURS)])]) == ""
