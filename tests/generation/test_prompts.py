from pathlib import Path

import pytest

from s2q.common.errors import InvalidInputError
from s2q.generation.prompts import check_distinct, read_prompts


def test_reads_lines_without_blanks_and_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# scenes\na cat\n\n  a dog on a mat  \r\nnaïve\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog on a mat", "naïve"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no prompt"),
        (b"\n# only a comment\n", "contains no prompt"),
        (b"a cat\nb\na cat \n", "line 3 repeats the prompt of line 1"),
        (b"caf\xe9", "not UTF-8 text"),
    ],
)
def test_files_that_are_no_prompt_lists_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InvalidInputError, match="no such prompts file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_repeated_prompt_is_refused():
    check_distinct(["a", "b"])
    with pytest.raises(InvalidInputError, match="'a' appears twice"):
        check_distinct(["a", "b", "a"])


# everything at which str.splitlines cuts, except \n and \r
SEPARATORS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("separator", [*SEPARATORS, "\t", "\xa0", "\u200b", "\u3000"])
def test_lines_end_at_no_other_character(tmp_path, separator):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a cat{separator}on a mat\nb\n".encode())
    assert read_prompts(path) == [f"a cat{separator}on a mat", "b"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_files_of_all_systems_give_the_same_prompts(tmp_path, end, mark):
    path = tmp_path / "prompts.txt"
    path.write_bytes((mark + end.join(["# scenes", "a cat", "", "  b  ", "", "", ""])).encode())
    assert read_prompts(path) == ["a cat", "b"]
    path.write_bytes(end.join(["a", "b", "", "a"]).encode())
    with pytest.raises(InvalidInputError, match="line 4 repeats the prompt of line 1"):
        read_prompts(path)


def test_a_file_without_an_end_is_refused():
    with pytest.raises(InvalidInputError, match="/dev/zero: longer than 64 MiB"):
        read_prompts(Path("/dev/zero"))
