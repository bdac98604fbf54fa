"""The Hessian of a layer's squared error, accumulated over batches of its input.

    E(Ŵ) = Σ_t ‖x_t (Ŵ - W)ᵀ‖² = ½ · tr((Ŵ - W) H (Ŵ - W)ᵀ),    H = 2 Σ_t x_tᵀ x_t = 2 Xᵀ X

Shapes: `I/O` in/out features; every leading dimension of an input counts tokens t.
"""

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.common.torch_state import tf32_products
from s2q.core.memo import PIECE


class HessianAccumulator:
    """Sums 2 XᵀX in fp32, of products in TF32 on a GPU, over batches of `num_tokens` in all; holds I² numbers.

    `PIECE` tokens at a time are copied in fp32.
    """

    def __init__(self, in_features: int, *, device: torch.device | str | None = None) -> None:
        self.num_tokens = 0
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add a batch [..., I] of the input as the rounded layer will see it, that is transformed and quantized.

        NaN and infinite values of the input, and sums that overflow, make H so.

        Raises:
            InvalidInputError: If the shape does not fit.
        """
        features = self._sum.shape[0]
        if x.shape[-1] != features:
            raise InvalidInputError(f"Hessian: got an input of shape {list(x.shape)}; expected [..., {features}]")
        rows = x.reshape(-1, features)
        with tf32_products(self._sum.device):
            for part in torch.split(rows, PIECE):
                wide = part.to(self._sum)
                self._sum.addmm_(wide.t(), wide, alpha=2.0)
        self.num_tokens += len(rows)

    def hessian(self) -> Tensor:
        """Return H, fp32 [I, I], symmetric; InvalidInputError if nothing has been added."""
        if self.num_tokens == 0:
            raise InvalidInputError("Hessian: has seen no tokens; run the calibration samples through the layer first")
        return (self._sum + self._sum.t()) / 2


def hessian_error(deviation: Tensor, hessian: Tensor) -> Tensor:
    """Compute the cost of a deviation [O, I], ½ · (Ŵ - W)_o H (Ŵ - W)_oᵀ of each output channel, fp64 [O]."""
    wide = deviation.double()
    return (wide @ hessian.double() * wide).sum(dim=1) / 2
