import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.distillation.loss import weighted_token_loss


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(seed):
    return [draw(2, 5, 4, seed=seed), draw(2, 3, 4, seed=seed + 1)]


WEIGHTS = [draw(2, 5, seed=8).abs(), draw(2, 3, seed=9).abs()]


def looped(student, teacher, weights):
    """Eq. 10, token by token."""
    samples, total = student[0].shape[0], 0.0
    for sample in range(samples):
        one, tokens = 0.0, 0
        for found, wanted, weight in zip(student, teacher, weights, strict=True):
            for token in range(found.shape[1]):
                distance = sum(
                    float(found[sample, token, channel] - wanted[sample, token, channel]) ** 2
                    for channel in range(found.shape[2])
                )
                one += float(weight[sample, token]) * distance
                tokens += 1
        total += one / tokens
    return total / samples


def test_equals_the_loop_over_tokens():
    student, teacher = streams(0), streams(2)
    assert float(weighted_token_loss(student, teacher, weights=WEIGHTS)) == pytest.approx(
        looped(student, teacher, WEIGHTS), rel=1e-6
    )
    ones = [torch.ones_like(weight) for weight in WEIGHTS]
    assert float(weighted_token_loss(student, teacher)) == pytest.approx(looped(student, teacher, ones), rel=1e-6)


def test_the_example_of_the_docstring():
    video, text = torch.tensor([[[1.0, 1.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0]]])
    zeros = [torch.zeros_like(video), torch.zeros_like(text)]
    weights = [torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0]])]
    assert float(weighted_token_loss([video, text], zeros, weights=weights)) == pytest.approx(13 / 3)


def test_one_stream_or_the_same_tokens_in_two_are_the_same():
    student, teacher = draw(2, 8, 4), draw(2, 8, 4, seed=1)
    weights = draw(2, 8, seed=2).abs()
    cut = [list(torch.split(tensor, [5, 3], dim=1)) for tensor in (student, teacher, weights)]
    torch.testing.assert_close(
        weighted_token_loss(cut[0], cut[1], weights=cut[2]),
        weighted_token_loss([student], [teacher], weights=[weights]),
    )


def test_gradient_of_a_token_is_in_proportion_to_its_weight_and_the_teacher_gets_none():
    student, teacher = draw(1, 3, 4).requires_grad_(), draw(1, 3, 4, seed=1).requires_grad_()
    weights = torch.tensor([[1.0, 0.5, 0.0]])
    weighted_token_loss([student], [teacher], weights=[weights]).backward()
    torch.testing.assert_close(student.grad, 2 / 3 * weights[..., None] * (student - teacher).detach())
    assert teacher.grad is None


def test_half_precision_is_computed_in_fp32():
    student, teacher = draw(1, 300, 64).bfloat16(), draw(1, 300, 64, seed=1).bfloat16()
    loss = weighted_token_loss([student], [teacher])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, weighted_token_loss([student.float()], [teacher.float()]))


@pytest.mark.parametrize(
    ("student", "teacher", "weights", "message"),
    [
        ([], [], None, "0 student"),
        ([draw(1, 2, 3)], [], None, "1 student and 0 teacher"),
        ([draw(1, 2, 3)], [draw(1, 2, 3)], [], "with 0 weights"),
        ([draw(1, 2, 3)], [draw(1, 1, 3)], None, r"stream 0: got \[1, 2, 3\] and \[1, 1, 3\]"),
        ([draw(1, 0, 3)], [draw(1, 0, 3)], None, "stream 0"),
        ([draw(2, 3)], [draw(2, 3)], None, "stream 0"),
        ([draw(1, 2, 3)], [draw(1, 2, 3)], [draw(1, 3)], r"weights \[1, 3\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(student, teacher, weights, message):
    with pytest.raises(InvalidInputError, match=message):
        weighted_token_loss(student, teacher, weights=weights)
