"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, version 0.1), with weights from a file.

    d(x, y) = Σ_l mean_{h,w} Σ_c w_lc (x̂_lchw − ŷ_lchw)²

with x̂_l the activations of layer l of AlexNet or VGG-16, the channels of each position scaled to length 1, and w_l
learned. The file is the state dict of the `lpips` package's model, trunk included; neither that package nor torchvision
is needed here, and nothing is downloaded.

Legend: `F` frames, `H`, `W` height and width in pixels, `C` channels of a layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from s2q.common.errors import InvalidInputError, first_line

_MIN_PIXELS = 32
_FRAMES_AT_ONCE = 8
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True, kw_only=True)
class _Trunk:
    """The convolutional part of a network, cut where its activations are compared.

    Attributes:
        stages: Each stage's convolutions, by their index in the network; a ReLU follows each.
        pooled: Stages that begin with a max pooling of stride 2.
        pool: Size of its window in pixels.
        first: Stride and padding of the first convolution; the others keep the size.
    """

    stages: tuple[tuple[int, ...], ...]
    pooled: frozenset[int]
    pool: int
    first: tuple[int, int]

    def layers(self) -> Iterator[tuple[int, str]]:
        """Yield each convolution's stage and the prefix of its tensors."""
        for stage, indices in enumerate(self.stages):
            for index in indices:
                yield stage, f"net.slice{stage + 1}.{index}"


_ALEXNET = _Trunk(stages=((0,), (3,), (6,), (8,), (10,)), pooled=frozenset({1, 2}), pool=3, first=(4, 2))
_VGG16 = _Trunk(
    stages=((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
    pooled=frozenset({1, 2, 3, 4}),
    pool=2,
    first=(1, 1),
)


class Lpips:
    """LPIPS with the weights of a file, the state dict of `lpips.LPIPS(net="alex")` or `net="vgg"`."""

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        tensors = _state_dict(path)
        first = tensors.get("net.slice1.0.weight")
        self._trunk = _ALEXNET if first is not None and first.shape[-1] == 11 else _VGG16
        self._weights = {
            name: tensor.float().to(device) for name, tensor in _needed(tensors, self._trunk, path).items()
        }
        self._device = device

    @torch.no_grad()
    def __call__(self, frames: torch.Tensor, reference: torch.Tensor) -> float | None:
        """Return the distance of two videos `[F, H, W, 3]`, uint8, averaged over the frames, dimensionless.

        None for frames below 32 pixels, which the network shrinks to nothing.
        """
        if min(frames.shape[1:3]) < _MIN_PIXELS:
            return None
        total = 0.0
        for start in range(0, len(frames), _FRAMES_AT_ONCE):
            pair = (video[start : start + _FRAMES_AT_ONCE].to(self._device) for video in (frames, reference))
            total += float(self._distances(*(self._activations(part) for part in pair)).sum())
        return total / len(frames)

    def _activations(self, frames: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = (torch.tensor(values, device=frames.device).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        x = (frames.permute(0, 3, 1, 2).float() / 127.5 - 1 - shift) / scale
        activations: list[torch.Tensor] = []
        for stage, prefix in self._trunk.layers():
            if stage == len(activations) and stage in self._trunk.pooled:
                x = F.max_pool2d(x, self._trunk.pool, stride=2)
            weight = self._weights[f"{prefix}.weight"]
            stride, padding = self._trunk.first if prefix == "net.slice1.0" else (1, weight.shape[-1] // 2)
            x = F.relu(F.conv2d(x, weight, self._weights[f"{prefix}.bias"], stride=stride, padding=padding))
            activations[stage:] = [x]
        return activations

    def _distances(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(len(first[0]), device=first[0].device)
        for stage, (x, y) in enumerate(zip(first, second, strict=True)):
            x, y = (side / (side.norm(dim=1, keepdim=True) + 1e-10) for side in (x, y))
            weighted = F.conv2d((x - y).square(), self._weights[f"lin{stage}.model.1.weight"])
            total = total + weighted.mean(dim=(1, 2, 3))
        return total


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a `.safetensors` file, or from one of `torch.save` that holds nothing but tensors."""
    if not path.is_file():
        raise InvalidInputError(f"{path}: no such weight file; s2q does not download weights, pass the path of a copy")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way, and torch.load in many
        raise InvalidInputError(f"{path}: cannot be read as weights: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InvalidInputError(f"{path}: expected a state dict, tensors by name; got {type(content).__name__}")
    return content


def _needed(tensors: Mapping[str, torch.Tensor], trunk: _Trunk, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a trunk and its channel weights, checked for shape."""
    needed: dict[str, torch.Tensor] = {}
    channels = 3
    for stage, prefix in trunk.layers():
        needed |= {name: tensors[name] for name in (f"{prefix}.weight", f"{prefix}.bias") if name in tensors}
        weight = needed.get(f"{prefix}.weight")
        if f"{prefix}.bias" not in needed or weight is None or weight.ndim != 4 or weight.shape[1] != channels:
            raise _not_lpips(path, f"no {prefix}.weight and .bias of a convolution of {channels} channels")
        channels = weight.shape[0]
        if prefix.endswith(f".{trunk.stages[stage][-1]}"):
            name = f"lin{stage}.model.1.weight"
            if name not in tensors or tensors[name].shape != (1, channels, 1, 1):
                raise _not_lpips(path, f"no {name} of shape (1, {channels}, 1, 1)")
            needed[name] = tensors[name]
    return needed


def _not_lpips(path: Path, lack: str) -> InvalidInputError:
    return InvalidInputError(
        f"{path}: {lack}; expected all of LPIPS, trunk included, as written once by "
        "torch.save(lpips.LPIPS(net='alex').state_dict(), 'lpips-alex.pth')"
    )
