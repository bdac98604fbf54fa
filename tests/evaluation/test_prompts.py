import pytest

from s2q.core.errors import InvalidInputError
from s2q.evaluation.prompts import check_distinct, read_prompts


def test_reads_lines_without_blanks_and_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# scenes\na cat\n\n  a dog on a mat  \r\nnaïve\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog on a mat", "naïve"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n# only a comment\n", "holds no prompt"),
        (b"a cat\nb\na cat \n", "line 3 repeats the prompt of line 1"),
        (b"caf\xe9", "not UTF-8 text"),
    ],
)
def test_bad_files(tmp_path, content, message):
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
    with pytest.raises(InvalidInputError, match="got one string; pass a list"):
        check_distinct("abc")
