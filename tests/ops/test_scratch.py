import threading

import torch

from s2q.core.input_path import InputTensors
from s2q.core.packing import pack_codes
from s2q.ops import scratch
from s2q.ops.activation_path import activation_path
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul


def test_memory_is_used_again_by_the_same_use_and_grows():
    first = scratch.take("test", (4, 8), torch.int32)
    smaller = scratch.take("test", (2, 8), torch.bfloat16)
    assert first.data_ptr() == smaller.data_ptr()
    assert scratch.take("another", (4, 8), torch.int32).data_ptr() != first.data_ptr()
    larger = scratch.take("test", (64, 8), torch.int32)
    assert larger.shape == (64, 8)
    assert larger.is_contiguous()


def test_threads_do_not_share():
    mine, found = scratch.take("test", (8,), torch.float32), []
    thread = threading.Thread(target=lambda: found.append(scratch.take("test", (8,), torch.float32)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != mine.data_ptr()


def test_what_inference_mode_made_can_be_written_outside():
    with torch.inference_mode():
        scratch.take("made in inference mode", (8,), torch.float32).zero_()
    scratch.take("made in inference mode", (8,), torch.float32).add_(1)


def test_memory_of_real_widths_stays_below_72_mib():
    """The only memory that outlives a call, beside 200 MiB of packed weights in the smallest published model."""
    scratch.release()
    for rows, depth, columns in ((4096, 192, 12288), (8, 12288, 3072)):  # most sums, most codes
        w = pack_codes(torch.randint(-8, 8, (columns, depth), dtype=torch.int8), num_bits=4)
        codes = torch.randint(-32, 32, (rows, depth), dtype=torch.int8)
        scales = torch.ones(rows, 1), torch.ones(columns)
        rescaled_int_matmul(codes, scales[0], w, scales[1], x_bits=6, w_bits=4, out_dtype=torch.bfloat16)
    x = torch.randn(600, 12288, dtype=torch.bfloat16)
    activation_path(x, InputTensors(left=torch.eye(96), right=torch.eye(128), scale=torch.ones(12288)), num_bits=6)
    assert 16 << 20 < sum(buffer.nbytes for buffer in vars(scratch._BUFFERS).values()) < 72 << 20
    scratch.release()
