"""The mean of each token, kept out of quantization: what is quantized is centred, and so has a smaller maximum.

    y = x - mean(x),    W x = W y + mean(x) · W 1

The sums W 1 of the rows of the weight, [O, 1], are stored; the means are coefficients that multiply them.
"""

from torch import Tensor

from s2q.core.input_path import InputPart, StoredTensor


def centred(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return a transformed input [..., I] without the means of its tokens, and the means [..., 1]."""
    mean = y.mean(dim=-1, keepdim=True)
    return y - mean, mean


TOKEN_MEAN = InputPart(
    tensors={
        "row_sums": StoredTensor(
            lambda i, o, size: (o, 1), of_linear=True, start=lambda weight: weight.sum(dim=1, keepdim=True)
        )
    },
    apply=centred,
)
