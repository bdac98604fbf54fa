"""The loss on the similarities of frames, against a computation of its own."""

import math

import pytest
import torch

from s2q.blocks.distil import (
    BlockSample,
    block_loss,
    distil,
)
from s2q.common.errors import InvalidInputError
from s2q.core.tokens import TokenGrid
from s2q.distillation.options import Distillation
from s2q.distillation.temporal import temporal_loss
from tiny import ListedSamples


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def independent(student, teacher, frames):
    """In plain numbers, pair by pair."""

    def relations(video):
        rows = [frame.flatten().tolist() for frame in video.double().chunk(frames, dim=0)]
        norms = [math.sqrt(sum(value**2 for value in row)) for row in rows]
        result = []
        for one, own in zip(rows, norms, strict=True):
            cosines = [
                sum(a * b for a, b in zip(one, other, strict=True)) / (own * norm)
                for other, norm in zip(rows, norms, strict=True)
            ]
            total = sum(math.exp(value) for value in cosines)
            result.append([math.exp(value) / total for value in cosines])
        return result

    divergence = 0.0
    for found, wanted in zip(student, teacher, strict=True):
        for q, p in zip(relations(found), relations(wanted), strict=True):
            divergence += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return divergence / (len(student) * frames**2)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_against_a_computation_pair_by_pair(frames):
    student, teacher = noise(2, 8, 3), noise(2, 8, 3, seed=1)
    loss = temporal_loss(student, teacher, frames=frames)
    assert float(loss) == pytest.approx(independent(student, teacher, frames), abs=1e-6)
    assert (float(loss) > 1e-3) == (frames > 1)


@pytest.mark.parametrize("noise_level", [1e-1, 1e-2, 1e-3])
def test_nearly_equal_relations_keep_their_digits(noise_level):
    teacher = noise(1, 52, 64)
    student = teacher + noise_level * noise(1, 52, 64, seed=1)
    loss = temporal_loss(student, teacher, frames=13)
    assert float(loss) == pytest.approx(independent(student, teacher, 13), rel=1e-3 if noise_level > 5e-3 else 3e-2)


def test_the_example_of_the_module():
    teacher, student = torch.eye(2).view(1, 2, 2), torch.ones(1, 2, 2)
    assert float(temporal_loss(student, teacher, frames=2)) == pytest.approx(0.055, abs=5e-4)


def test_zero_where_relations_are_the_same_and_a_gradient_where_they_are_not():
    teacher = noise(1, 6, 4)
    assert float(temporal_loss(3 * teacher, teacher, frames=3)) == pytest.approx(0, abs=1e-7)
    student = noise(1, 6, 4, seed=1).requires_grad_()
    temporal_loss(student, teacher.requires_grad_(), frames=3).backward()
    assert float(student.grad.abs().max()) > 0
    assert teacher.grad is None
    assert temporal_loss(student.bfloat16(), teacher.bfloat16(), frames=3).dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "teacher", "frames"), [((1, 6, 4), (1, 6, 3), 3), ((6, 4), (6, 4), 3), ((1, 6, 4), (1, 6, 4), 4)]
)
def test_what_does_not_fit_is_refused(student, teacher, frames):
    with pytest.raises(InvalidInputError, match="temporal loss: got"):
        temporal_loss(torch.ones(student), torch.ones(teacher), frames=frames)


class Scaled(torch.nn.Module):
    """A block of two streams, the text first, with one learnable vector."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, text, video):
        return text, video * self.scale


def test_it_is_added_to_the_loss_of_a_block_and_learned_from():
    text, video = noise(1, 2, 3), noise(1, 8, 3, seed=1)
    grid = TokenGrid(frames=4, height=1, width=2)
    sample = BlockSample(inputs={"text": text, "video": video}, outputs=(text, video), grid=grid, video=1)
    block, samples = Scaled(), ListedSamples([sample])
    own = independent((video * block.scale).detach(), video, 4)
    assert block_loss(block, samples, temporal=10) == pytest.approx(block_loss(block, samples) + 10 * 3 * own, rel=1e-5)
    report = distil(block, samples, options=Distillation(epochs=40, lr=0.05), temporal=10, seed=0)
    assert report.initial_loss == pytest.approx(block_loss(Scaled(), samples, temporal=10), rel=1e-6)
    assert report.loss < report.initial_loss / 10
    assert report.loss == pytest.approx(block_loss(block, samples, temporal=10), rel=1e-6)
