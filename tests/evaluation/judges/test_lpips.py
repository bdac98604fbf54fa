import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.evaluation.judges.lpips import Lpips

CUTS = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}
"""Where each network's layers are compared: after the ReLU before these indices."""


def network(name):
    """The convolutional layers by their published indices; VGG with fewer channels."""
    if name == "alex":
        plan = [(3, 64, 11, 4, 2), "pool", (64, 192, 5, 1, 2), "pool"]
        plan += [(192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    else:
        pairs = [(3, 4), (4, 4), "pool", (4, 6), (6, 6), "pool", (6, 8), (8, 8), (8, 8), "pool"]
        pairs += [(8, 9), (9, 9), (9, 9), "pool", (9, 9), (9, 9), (9, 9)]
        plan = [one if one == "pool" else (*one, 3, 1, 1) for one in pairs]
    layers = []
    for one in plan:
        layers += [nn.MaxPool2d(3 if name == "alex" else 2, 2)] if one == "pool" else [nn.Conv2d(*one), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.fixture(params=["alex", "vgg"])
def stand_in(request, tmp_path):
    """Random weights in a file, the network that they are of, and each comparison's channel weights."""
    torch.manual_seed(0)
    layers, cuts = network(request.param), (0, *CUTS[request.param])
    tensors, weights = {}, []
    for stage, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        for index in range(start, end):
            for name, tensor in layers[index].named_parameters():
                tensors[f"net.slice{stage + 1}.{index}.{name}"] = tensor.detach()
        channels = [layer for layer in layers[:end] if isinstance(layer, nn.Conv2d)][-1].out_channels
        weights.append(torch.rand(channels))
        tensors[f"lin{stage}.model.1.weight"] = weights[-1].view(1, channels, 1, 1)
    path = tmp_path / "lpips.pth"
    torch.save(tensors | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, path)
    return path, layers, cuts[1:], weights


def frames(seed, *, count=10, height=33, width=47):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def by_hand(first, second, layers, cuts, weights):
    total = 0.0
    for one in zip(first, second, strict=True):
        pair = torch.stack(one).permute(0, 3, 1, 2).double() / 255 * 2 - 1
        shift, scale = (torch.tensor(v).double().view(3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
        for stage, cut in enumerate(cuts):
            x, y = layers.double()[:cut]((pair - shift) / scale)
            apart = (F.normalize(x, dim=0) - F.normalize(y, dim=0)) ** 2
            total += float(torch.einsum("c,chw->hw", weights[stage].double(), apart).mean())
    return total / len(first)


def test_lpips_equals_the_definition(stand_in):
    path, layers, cuts, weights = stand_in
    judge, x, y = Lpips(path), frames(0), frames(1)
    expected = by_hand(x, y, layers, cuts, weights)
    assert judge(x, y) == pytest.approx(expected, rel=1e-4)
    assert judge(y, x) == pytest.approx(expected, rel=1e-4)
    assert judge(x, x) == 0.0
    assert judge(x[:3], y[:3]) != pytest.approx(expected, rel=1e-3)


def test_frames_that_the_network_shrinks_to_nothing_have_none(stand_in):
    judge = Lpips(stand_in[0])
    small = frames(0, height=31)
    assert judge(small, small) is None
    smallest = frames(0, height=32, width=32)
    assert judge(smallest, smallest) == 0.0


def test_lpips_equals_the_package(tmp_path):
    package = pytest.importorskip("lpips", reason="the package lpips is not installed")
    torch.manual_seed(0)
    theirs = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    torch.save(theirs.state_dict(), tmp_path / "lpips.pth")
    x, y = frames(0), frames(1)
    pair = ((one.permute(0, 3, 1, 2) / 127.5 - 1) for one in (x, y))
    assert Lpips(tmp_path / "lpips.pth")(x, y) == pytest.approx(float(theirs(*pair).mean()), rel=1e-4)


def test_files_that_are_no_lpips_weights_are_refused(tmp_path, stand_in):
    with pytest.raises(InvalidInputError, match="no such weight file"):
        Lpips(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InvalidInputError, match=r"text\.pth: cannot be read as weights"):
        Lpips(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(InvalidInputError, match="cannot be read as weights"):
        Lpips(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InvalidInputError, match="expected a state dict"):
        Lpips(tmp_path / "list.pth")
    tensors = torch.load(stand_in[0], weights_only=True)
    torch.save({name: one for name, one in tensors.items() if name.startswith("lin")}, tmp_path / "lins.pth")
    with pytest.raises(InvalidInputError, match=r"no net\.slice1\.0\.weight.*trunk included"):
        Lpips(tmp_path / "lins.pth")
    torch.save(tensors | {"lin2.model.1.weight": torch.ones(1, 2, 1, 1)}, tmp_path / "lin2.pth")
    with pytest.raises(InvalidInputError, match=r"no lin2\.model\.1\.weight of shape"):
        Lpips(tmp_path / "lin2.pth")
