import torch

from s2q.calibration.input_statistics import InputStatistics

CALLS = ((7, [[1.0, -3.0], [2.0, 0.0]]), (3, [[0.5, 0.5]]), (7, [[-4.0, 1.0]]))


def statistics():
    found = InputStatistics(2, torch.device("cpu"), moments=True)
    for timestep, rows in CALLS:
        found.add(torch.tensor([rows]), timestep=timestep)
    return found


def test_largest_magnitudes_are_those_of_each_timestep_in_order():
    assert statistics().amax(None).tolist() == [[0.5, 0.5], [4.0, 3.0]]
    shifted = statistics().amax(torch.tensor([1.0, -1.0]))
    assert shifted.tolist() == [[0.5, 1.5], [5.0, 2.0]]


def test_mean_and_moments_are_of_all_rows():
    rows = torch.tensor([row for _, block in CALLS for row in block])
    torch.testing.assert_close(statistics().mean(), rows.mean(dim=0))
    torch.testing.assert_close(statistics().second_moment(None).float(), rows.t() @ rows / 4)


def test_the_mean_of_bf16_rows_keeps_what_their_own_sum_would_lose():
    torch.manual_seed(0)
    rows = (20 + torch.randn(4000, 3)).bfloat16()
    found = InputStatistics(3, torch.device("cpu"), moments=True)
    found.add(rows, timestep=0)
    exact = rows.double()
    torch.testing.assert_close(found.mean().double(), exact.mean(dim=0), rtol=1e-5, atol=0)
    centred = exact - exact.mean(dim=0)
    moment = found.second_moment(exact.mean(dim=0))
    torch.testing.assert_close(moment, centred.t() @ centred / len(rows), rtol=0.05, atol=0.05)
    found.release()
    assert found.products is None
