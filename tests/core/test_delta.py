"""Video tokens quantized as differences from the mean of their cube."""

import json

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.schemes import Delta, LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme
from s2q.core.tokens import TokenGrid
from s2q.ops.fake_quantize import fake_quantize_input

GRID = TokenGrid(frames=3, height=2, width=5, text_tokens=4, text="before")


def scheme(bits=4, *, cube=(2, 2, 2), mean_bits=8, group_size=None):
    granularity = PerToken() if group_size is None else PerGroup(group_size=group_size)
    delta = Delta(cube=cube, mean_bits=mean_bits)
    return QuantScheme(num_bits=bits, granularity=granularity, dynamic=True, delta=delta)


def whole(bits=4):
    return QuantScheme(num_bits=bits, granularity=PerToken(), dynamic=True)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_deltas_equal_an_example_by_hand():
    # Two tokens of two features in one cube: the mean [127, 4] has a step of 1 and stays; so do differences ±[7, 3.4].
    grid = TokenGrid(frames=1, height=1, width=2)
    x = torch.tensor([[[134.0, 7.4], [120.0, 0.6]]])
    assert fake_quantize_input(x, scheme(cube=(1, 1, 2)), grid=grid).tolist() == [[[134, 7], [120, 1]]]
    assert fake_quantize_input(x, whole()).tolist()[0][0][1] == 0  # a step of 134 / 7 loses the small feature


def test_cubes_of_equal_tokens_are_exact():
    # Each mean has 127 as its largest value, so that its codes are its values, and the differences are 0.
    values = torch.randint(-126, 127, (1, 2, 1, 3, 8), generator=torch.Generator().manual_seed(1)).float()
    values[..., 0] = 127
    video = values.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :3, :, :5]
    assert torch.equal(fake_quantize_input(video.reshape(1, 30, 8), scheme(2), grid=GRID), video.reshape(1, 30, 8))


@pytest.mark.parametrize("cube", [(2, 2, 2), (1, 1, 1), (4, 4, 4)])
def test_high_bits_reconstruct(cube):
    x = noise(2, 34, 16)
    error = (fake_quantize_input(x, scheme(8, cube=cube), grid=GRID) - x).abs().max()
    assert float(error) < x.abs().max() / 127


def test_neighbours_that_are_alike_lose_less_than_by_themselves():
    video = noise(1, 1, 1, 1, 16, seed=1) * 10 + noise(1, 3, 2, 5, 16)
    x = video.reshape(1, 30, 16)
    errors = [
        float((fake_quantize_input(x, activation, grid=GRID) - x).square().mean()) for activation in (scheme(), whole())
    ]
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("text", ["before", "after"])
def test_text_is_quantized_as_it_is_and_video_as_if_there_were_none(text):
    grid = TokenGrid(frames=3, height=2, width=5, text_tokens=4, text=text)
    video, words = noise(2, 30, 8), noise(2, 4, 8, seed=1)
    joint = torch.cat([words, video] if text == "before" else [video, words], dim=1)
    result = fake_quantize_input(joint, scheme(), grid=grid)
    own_words, own_video = (result[:, :4], result[:, 4:]) if text == "before" else (result[:, 30:], result[:, :30])
    assert torch.equal(own_words, fake_quantize_input(words, whole()))
    assert torch.equal(own_video, fake_quantize_input(video, scheme(), grid=grid))


def test_without_a_grid_that_fits_tokens_are_quantized_as_they_are():
    for x, grid in ((noise(2, 30, 8), None), (noise(2, 31, 8), GRID), (noise(30, 8), GRID)):
        assert torch.equal(fake_quantize_input(x, scheme(), grid=grid), fake_quantize_input(x, whole()))


def test_against_the_definition_in_double_with_groups_and_a_clip():
    x, clip = noise(1, 30, 8), torch.tensor([0.8])
    video = x.double().view(3, 2, 5, 8)
    expected = torch.empty_like(video)

    def rounded(values, bits, ratio=1.0):
        top = 2 ** (bits - 1) - 1
        step = values.abs().amax(dim=-1, keepdim=True) * ratio / top
        return (values / step).round().clamp(-top - 1, top) * step

    for f, h, w in ((f, h, w) for f in (0, 2) for h in (0,) for w in (0, 2, 4)):
        own = (slice(f, f + 2), slice(h, h + 2), slice(w, w + 2))
        mean = rounded(video[own].mean(dim=(0, 1, 2)), 6)
        rest = (video[own] - mean).unflatten(-1, (2, 4))
        expected[own] = mean + rounded(rest, 4, 0.8).flatten(-2)
    result = fake_quantize_input(x, scheme(mean_bits=6, group_size=4), clip_ratio=clip, grid=GRID)
    assert ((result.double().view(3, 2, 5, 8) - expected).abs() < 1e-5).double().mean() > 0.98


def test_the_gradient_goes_straight_through():
    x, clip = noise(1, 34, 8).requires_grad_(), torch.tensor([0.9], requires_grad=True)
    fake_quantize_input(x, scheme(), grid=GRID).sum().backward()
    assert float((x.grad - 1).abs().mean()) < 0.1  # what is left goes through the scales, to the largest values
    fake_quantize_input(x.detach(), scheme(), clip_ratio=clip, grid=GRID).square().sum().backward()
    assert float(clip.grad.abs()) > 0


def test_names_and_json():
    weight = QuantScheme(num_bits=4, granularity=PerChannel())
    names = {
        "w4a4d222": scheme(),
        "w4a6d144m6": scheme(6, cube=(1, 4, 4), mean_bits=6),
        "w4a4g16d222": scheme(group_size=16),
        "w4a4d1x16x1": scheme(cube=(1, 16, 1)),
    }
    for name, activation in names.items():
        linear = LinearScheme(weight=weight, activation=activation)
        assert linear.name == name
        assert linear.simulated == (activation.granularity != PerToken())
        assert linear.needs_grid
        assert LinearScheme.from_dict(json.loads(json.dumps(linear.to_dict()))) == linear
    assert "delta" not in whole().to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cube": [2, 2]}, "three whole numbers"),
        ({"cube": [2, 2, 0]}, "three whole numbers"),
        ({"cube": 2}, "three whole numbers"),
        ({"cube": [2, 2, 2.0]}, "three whole numbers"),
        ({"mean_bits": 9}, "mean_bits=9"),
        ({"mean_bits": True}, "mean_bits=True"),
        ({"cubes": [2, 2, 2]}, "unknown key in delta 'cubes'"),
    ],
)
def test_what_is_not_valid_is_refused(fields, message):
    content = scheme().to_dict()
    with pytest.raises(InvalidInputError, match=message):
        QuantScheme.from_dict({**content, "delta": {**content["delta"], **fields}})


def test_a_static_scheme_has_no_deltas():
    with pytest.raises(InvalidInputError, match="expected a Delta in a dynamic scheme"):
        QuantScheme(num_bits=4, granularity=PerChannel(), delta=Delta(cube=(2, 2, 2)))
    with pytest.raises(InvalidInputError, match="expected a Delta"):
        QuantScheme(num_bits=4, granularity=PerToken(), dynamic=True, delta=(2, 2, 2))
