import io
import math

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from s2q.common.errors import InvalidInputError
from s2q.report.video import contact_sheet, difference, encode_mp4, enlarged, write_mp4


def scene(height=32, width=32, frames=5):
    """A moving red square on a grey gradient."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:] = np.linspace(60, 180, height).astype(np.uint8)[None, :, None, None]
    for index in range(frames):
        video[index, height // 4 : height // 2, index + 1 : index + 1 + width // 4] = (210, 40, 30)
    return video


def decoded(data, path):
    path.write_bytes(data)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.parametrize(("height", "width", "decibels"), [(32, 32, 40), (24, 40, 35), (31, 33, 30)])
def test_what_is_encoded_comes_back_nearly_the_same(tmp_path, height, width, decibels):
    video = scene(height, width)
    shown = enlarged(video, target=128)
    meta, back = decoded(encode_mp4(shown), tmp_path / "video.mp4")
    assert "h264" in meta["codec"]
    assert "yuv420p" in meta["pix_fmt"]
    assert meta["fps"] == 8
    assert len(back) == len(video)
    error = (back[:, : shown.shape[1], : shown.shape[2]].astype(float) - shown) ** 2
    assert 10 * math.log10(255**2 / error.mean()) > decibels


def test_encoding_is_reproducible():
    assert encode_mp4(scene()) == encode_mp4(scene())


def test_enlarging_repeats_whole_pixels_and_leaves_large_videos_alone():
    video = scene()
    large = enlarged(video, target=100)
    assert large.shape == (5, 96, 96, 3)
    assert np.array_equal(large[:, ::3, ::3], video)
    assert np.array_equal(large[:, 2::3, 2::3], video)
    assert enlarged(scene(8, 300)).shape == (5, 8, 300, 3)


def test_difference_has_no_wraparound_and_saturates():
    dark, light = np.full((1, 2, 2, 3), 10, np.uint8), np.full((1, 2, 2, 3), 20, np.uint8)
    assert (difference(dark, light, gain=4) == 40).all()
    assert (difference(light, dark, gain=4) == 40).all()
    assert (difference(dark, light, gain=100) == 255).all()


def test_contact_sheet_shows_first_and_last_frame_of_every_row():
    video = scene(frames=20)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet([("one", video), ("two", video[:3])], columns=4))))
    cells = 96 + 4
    top = 14 + 2 * 4
    for column, frame in enumerate((0, 6, 13, 19)):
        cell = sheet[top : top + 96, 4 + column * cells : 4 + column * cells + 96]
        assert np.array_equal(cell[::3, ::3], video[frame])
    second = sheet[2 * top + 96 : 2 * top + 192, 4 : 4 + 96]
    assert np.array_equal(second[::3, ::3], video[0])


def test_a_video_is_written_and_a_long_label_of_a_sheet_is_cut(tmp_path):
    write_mp4(tmp_path / "a.mp4", scene())
    sheet = contact_sheet([("a label that is much too long for the sheet " * 5, scene(frames=2))])
    assert (tmp_path / "a.mp4").stat().st_size > 500
    assert Image.open(io.BytesIO(sheet)).format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.parametrize("frames", [scene().astype(float), scene()[0], scene().transpose(0, 3, 1, 2), [1, 2]])
def test_other_arrays_are_refused(frames):
    with pytest.raises(InvalidInputError, match=r"uint8 array \[F, H, W, 3\]"):
        encode_mp4(frames)
    with pytest.raises(InvalidInputError, match="expected"):
        contact_sheet([])
