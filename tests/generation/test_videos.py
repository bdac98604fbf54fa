import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from s2q.common.errors import InvalidInputError
from s2q.generation import videos
from s2q.generation.prompts import prompt_list, prompt_record, read_prompts
from s2q.generation.videos import conditioning_video, still
from s2q.report.video import encode_mp4
from tiny import moving_square

FRAMES = moving_square("red", frames=5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "pose.mp4"
    path.write_bytes(encode_mp4(np.stack([np.array(frame) for frame in FRAMES])))
    return path


def distance(frame, other):
    return float(np.abs(np.array(frame).astype(float) - np.array(other)).mean())


def test_a_file_is_decoded_frame_by_frame(file):
    video = conditioning_video("pose_video", file, None)
    assert (video.name, video.count) == ("pose.mp4", 5)
    decoded = video.frames(3)
    assert len(decoded) == 3
    for frame, other in zip(decoded, FRAMES, strict=False):
        assert frame.size == (40, 24)
        assert distance(frame, other) < 8 < distance(frame, FRAMES[-1])


def test_a_gif_is_a_video(tmp_path):
    FRAMES[0].save(tmp_path / "pose.gif", save_all=True, append_images=FRAMES[1:], duration=100)
    video = conditioning_video("pose_video", tmp_path / "pose.gif", None)
    assert video.count == 5
    assert distance(video.frames(5)[-1], FRAMES[-1]) < 8


def test_frames_from_memory_are_kept_as_rgb():
    video = conditioning_video("pose_video", [frame.convert("RGBA") for frame in FRAMES], None)
    assert [np.array(frame).tolist() for frame in video.frames(5)] == [np.array(frame).tolist() for frame in FRAMES]
    assert conditioning_video("pose_video", FRAMES, None).sha256 == video.sha256
    assert conditioning_video("pose_video", FRAMES[:4], None).sha256 != video.sha256


def test_a_still_has_as_many_frames_as_are_asked_for():
    assert still(FRAMES[0]).count is None
    assert still(FRAMES[0]).frames(7) == [FRAMES[0]] * 7


def test_a_prompt_has_its_videos_in_copies_and_records(file):
    (prompt,) = prompt_list("prompts", [{"prompt": "a man", "image": FRAMES[0], "pose_video": file}])
    for copied in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt)), *prompt_list("prompts", [prompt])):
        assert copied.videos == prompt.videos
        assert copied.videos["pose_video"].frames(1)[0].size == (40, 24)
    assert prompt_record(prompt)["pose_video"] == {
        "name": "pose.mp4",
        "sha256": prompt.videos["pose_video"].sha256,
    }


def lines_of(tmp_path, pose):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b", "pose_video": pose}))
    return path


def test_paths_are_relative_to_the_prompt_file(file, tmp_path):
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses/one.mp4").write_bytes(file.read_bytes())
    prompts = read_prompts(lines_of(tmp_path, "poses/one.mp4"))
    assert [list(prompt.videos) for prompt in prompts] == [[], ["pose_video"]]


PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is not a video; expected one of AVI, GIF"),
        (b"no video", "is not a video"),
        (PLAYLIST, "is not a video"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "is not a video"),
    ],
)
def test_a_bad_video_is_refused_with_the_line(tmp_path, file, content, message):
    (tmp_path / "other.mp4").write_bytes(file.read_bytes())
    if content is not None:
        (tmp_path / "pose.mp4").write_bytes(content)
    with pytest.raises(InvalidInputError, match=rf"prompts.jsonl: line 2: pose_video: .*pose.mp4: {message}"):
        read_prompts(lines_of(tmp_path, "pose.mp4"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "got 5; expected the path of a video or a list of images"),
        ([], "expected the frames as PIL images, at least one"),
        ([FRAMES[0], "b"], "expected the frames as PIL images"),
        ([FRAMES[0], Image.new("RGB", (8, 8))], "frames of several sizes"),
    ],
)
def test_what_is_no_video_is_refused(given, message):
    with pytest.raises(InvalidInputError, match=f"prompt 1 of 1: face_video: .*{message}"):
        prompt_list("prompts", [{"prompt": "a", "face_video": given}])


def test_a_folder_and_a_huge_file_are_refused(tmp_path, file, monkeypatch):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        conditioning_video("pose_video", tmp_path, None)
    monkeypatch.setattr(videos, "_MAX_BYTES", 100)
    with pytest.raises(InvalidInputError, match="expected at most"):
        conditioning_video("pose_video", file, None)
