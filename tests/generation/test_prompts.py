import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2q.common.errors import InvalidInputError
from s2q.generation.prompts import Prompt, check_distinct, prompt_list, prompt_record, read_prompts


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


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "prompts: got one string; pass a list of prompts"),
        (b"a cat", "pass a list of prompts"),
        (None, "pass a list of prompts"),
        (7, "pass a list of prompts"),
        ({"a cat"}, "pass a list of prompts"),
        ({"a cat": 1}, "pass a list of prompts"),
        (Path("prompts.txt"), "pass a list of prompts"),
        (["a", ""], "prompt 2 of 2 is empty"),
        (["a", " \t\n"], "prompt 2 of 2 is empty"),
        (["a", None], "prompt 2 of 2: got None; expected text"),
        ([7], "prompt 1 of 1: got 7; expected text"),
        ([b"a"], "prompt 1 of 1: got b'a'; expected text"),
        ([["a"]], r"prompt 1 of 1: got \['a'\]; expected text"),
        (["a\udcff"], "prompt 1 of 1: .* character 2 is not Unicode text"),
    ],
)
def test_other_prompts_are_refused(prompts, message):
    with pytest.raises(InvalidInputError, match=message):
        prompt_list("prompts", prompts)


@pytest.mark.parametrize("prompts", [["a", "b"], ("a", "b"), iter(["a", "b"]), np.array(["a", "b"])])
def test_prompts_are_a_list_of_texts(prompts):
    assert prompt_list("prompts", prompts) == ["a", "b"]
    assert all(type(prompt) is Prompt for prompt in prompt_list("prompts", ["a", np.str_("b"), Prompt("c")]))


def picture(path, mode="RGB", size=(6, 4), **options):
    Image.new(mode, size, 90).save(path, **options)
    return path


def json_lines(path, *items):
    path.write_text("".join(f"{json.dumps(item, ensure_ascii=False)}\n" for item in items), encoding="utf-8")
    return path


def test_a_jsonl_file_has_images_relative_to_it_negative_prompts_and_seeds(tmp_path):
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images/cat.png")
    item = {"prompt": " a cat ", "image": "images/cat.png", "negative_prompt": "", "seed": 7}
    path = json_lines(tmp_path / "prompts.jsonl", item, {"prompt": "naïve\u2028 #"})
    path.write_text("\ufeff\n" + path.read_text() + "  \n", encoding="utf-8")
    first, second = read_prompts(path)
    assert (first, first.negative_prompt, first.seed) == (" a cat ", "", 7)
    assert (first.image.name, first.image.pixels.size) == ("cat.png", (6, 4))
    assert second == "naïve\u2028 #"
    assert prompt_record(second) == second
    assert prompt_record(first) == {**item, "image": {"name": "cat.png", "sha256": first.image.sha256}}
    for other in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        assert prompt_record(other) == prompt_record(first)
        assert other.image.pixels.tobytes() == first.image.pixels.tobytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "is not JSON"),
        ("a cat", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a cat"]', r"got \['a cat'\]; expected an object"),
        ("{}", 'has no "prompt"'),
        ('{"prompt": null}', "got None; expected text"),
        ('{"prompt": " "}', "is empty"),
        ('{"prompt": 7}', "got 7; expected text"),
        ('{"prompt": "a"}', "repeats the prompt of line 1"),
        ('{"prompt": "b", "imgae": "a.png"}', "unknown key 'imgae'; expected some of prompt, image"),
        ('{"prompt": "b", "negative_prompt": 7}', "negative_prompt: got 7; expected text"),
        ('{"prompt": "b", "seed": 1.0}', "seed: got 1.0; expected a whole number"),
        ('{"prompt": "b", "seed": -1}', "seed: got -1; expected at least 0"),
        ('{"prompt": "b", "image": 7}', "image: got 7; expected the path of an image"),
        ('{"prompt": "b", "image": "none.png"}', "image: .*none.png: no such file"),
        ('{"prompt": "b", "image": "prompts.jsonl"}', "image: .*prompts.jsonl: is not an image; expected one of BMP"),
        ('{"prompt": "b", "image": "."}', "image: .*: cannot be read: Is a directory"),
        ('{"prompt": "b", "image": "cut.png"}', "image: .*cut.png: cannot be read: "),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, message):
    cut = picture(tmp_path / "cut.png", size=(60, 60))
    cut.write_bytes(cut.read_bytes()[:-30])
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(InvalidInputError, match=f"^{path}: line 3:? ?{message}"):
        read_prompts(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = picture(tmp_path / "image.tiff", mode)
    (prompt,) = prompt_list("prompts", [{"prompt": "a", "image": path}])
    assert (prompt.image.pixels.mode, prompt.image.pixels.size) == ("RGB", (6, 4))


def test_levels_of_16_bits_are_scaled_and_of_32_bits_refused(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    (prompt,) = prompt_list("prompts", [{"prompt": "a", "image": tmp_path / "deep.png"}])
    assert np.asarray(prompt.image.pixels)[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InvalidInputError, match=r"float.tiff: has grey levels of 32 bits"):
        prompt_list("prompts", [{"prompt": "a", "image": tmp_path / "float.tiff"}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(" "), "is empty"),
        (Prompt("a", seed=-1), "seed: got -1"),
        (Prompt("a", image="none.png"), "none.png: no such file"),
    ],
)
def test_a_prompt_that_somebody_made_is_checked(prompt, message):
    with pytest.raises(InvalidInputError, match=message):
        prompt_list("prompts", [prompt])


def test_an_image_is_turned_as_its_orientation_says_and_told_apart_by_its_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(tmp_path / "turned.jpg", exif=exif)
    prompts = prompt_list("prompts", [{"prompt": "a", "image": image} for image in (turned, Image.open(turned))])
    assert [prompt.image.pixels.size for prompt in prompts] == [(4, 6), (6, 4)]
    assert prompts[0] == prompts[1]
    assert prompts[0].image.sha256 != prompts[1].image.sha256


def test_a_program_is_not_an_image(tmp_path):
    path = tmp_path / "image.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(InvalidInputError, match=r"prompt 1 of 1: image: .*image.png: is not an image"):
        prompt_list("prompts", [{"prompt": "a", "image": path}])
