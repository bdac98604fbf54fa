"""Sizes as people write them."""

import pytest

from s2q.common.errors import InvalidInputError
from s2q.core.storage import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [(7, 7), ("512", 512), ("16GB", 16 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 15 * 10**8), ("80MB", 80 * 10**6)],
)
def test_sizes_with_and_without_units(text, expected):
    assert parse_bytes(text, option="memory_budget") == expected


@pytest.mark.parametrize("text", ["", "GB", "16GX", "-1GB", "0", "1e9", "16 000"])
def test_what_is_no_size_is_refused_by_the_name_of_the_option(text):
    with pytest.raises(InvalidInputError, match=r"--device-memory: got .*expected a size such as 16GB"):
        parse_bytes(text, option="--device-memory")
