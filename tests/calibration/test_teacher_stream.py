"""The calibration stream returns, for each block and sample, the bits that the block gets in the whole model."""

import itertools

import pytest
import torch

from s2q.calibration.stream import TeacherStream, named_arguments
from s2q.common.tensor_store import HostMemory, TensorStore
from s2q.models import block_names, family_of
from tiny import tiny_pipeline

SAMPLES = 3


def calls_of(transformer, *, seed=0):
    """Keyword arguments of calls that differ in everything."""
    generator = torch.Generator().manual_seed(seed)
    config, text_width = transformer.config, 32

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    calls = []
    for sample in range(SAMPLES):
        call = {"encoder_hidden_states": draw(1, 16, text_width), "timestep": torch.tensor([100 * (sample + 1)])}
        if "max_text_seq_length" in config:
            call["hidden_states"] = draw(1, 3, config.in_channels, 2, 2)
        else:
            call["hidden_states"] = draw(1, config.in_channels, 3, 2, 2)
        if "pooled_projection_dim" in config:
            call |= {"pooled_projections": draw(1, 32), "guidance": torch.tensor([6000.0])}
            call["encoder_attention_mask"] = torch.arange(16)[None] < 16 - sample
        calls.append(call)
    return calls


@torch.no_grad()
def recorded(transformer, calls):
    """What each block is called with when the whole model runs: [block][sample], arguments by name."""
    found, handles = [], []
    for name in block_names(transformer, family_of(transformer)):
        block, samples = transformer.get_submodule(name), []
        found.append(samples)

        def listen(module, args, kwargs, samples=samples):
            samples.append({name: clone(value) for name, value in named_arguments(module, args, kwargs).items()})

        handles.append(block.register_forward_pre_hook(listen, with_kwargs=True))
    for call in calls:
        transformer(**call, return_dict=False)
    for handle in handles:
        handle.remove()
    return found


def clone(value):
    if isinstance(value, tuple):
        return tuple(clone(one) for one in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def equal(value, other):
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(equal, value, other))
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    return value == other


def check(stream, expected, blocks):
    """The inputs of blocks, in an order."""
    for block in blocks:
        stream.advance(block)
        for sample in range(SAMPLES):
            inputs = stream.inputs(sample)
            assert inputs.keys() == expected[block][sample].keys()
            for name, value in expected[block][sample].items():
                assert equal(inputs[name], value), (block, sample, name)


def stream_bytes(stream, expected):
    """Bytes of the streams of one sample."""
    return sum(expected[0][0][name].nbytes for name in stream.streams)


class Model:
    """A tiny transformer, calls of it and what its blocks get."""

    def __init__(self, transformer, *, seed=0):
        self.transformer, self.calls = transformer, calls_of(transformer, seed=seed)
        self.expected = recorded(transformer, self.calls)
        self.blocks = range(len(self.expected))

    def stream(self, folder, **options):
        family = family_of(self.transformer)
        return TeacherStream(
            self.transformer,
            block_names(self.transformer, family),
            calls=[lambda call=call: dict(call) for call in self.calls],
            names=[f"sample {sample}" for sample in range(SAMPLES)],
            steps=range(SAMPLES),
            family=family,
            folder=folder,
            **options,
        )


@pytest.fixture(scope="module", params=["cogvideox", "wan", "hunyuanvideo"])
def model(request):
    layers = None if request.param == "hunyuanvideo" else 3
    return Model(tiny_pipeline(request.param, num_layers=layers).transformer)


def test_inputs_of_samples_and_blocks_differ_in_this_test(model):
    """Otherwise a stream that returned another block's or sample's activations would pass the others."""
    streams = family_of(model.transformer).streams
    first = [[samples[index][streams[0]] for index in range(SAMPLES)] for samples in model.expected]
    assert len(first) >= 2
    for one, other in itertools.combinations(itertools.chain.from_iterable(first), 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("in_memory", [0, 1, 2, SAMPLES])
def test_blocks_get_the_bits_of_the_whole_model_wherever_samples_are_stored(model, tmp_path, in_memory):
    memory = HostMemory(0)
    stream = model.stream(tmp_path, memory=memory)
    budget = in_memory * stream_bytes(stream, model.expected)
    memory.give_back(budget)
    for block in model.blocks:
        check(stream, model.expected, [block])
        assert len(list(tmp_path.iterdir())) == SAMPLES - in_memory
        assert memory.left == 0
    stream.close()
    assert list(tmp_path.iterdir()) == []
    assert memory.left == budget


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_blocks_in_any_order_get_the_same_bits(model, tmp_path, budget):
    stream = model.stream(tmp_path, memory=HostMemory(budget))
    orders = list(itertools.permutations(model.blocks))
    assert len(orders) >= 2
    for order in orders:
        check(stream, model.expected, order)


@pytest.mark.parametrize("killed_at", [0, 1])
def test_a_resumed_stream_skips_finished_blocks_and_ignores_files_of_the_killed_one(model, tmp_path, killed_at):
    killed = model.stream(tmp_path, memory=HostMemory(0))
    killed.advance(killed_at)
    assert len(list(tmp_path.iterdir())) == SAMPLES
    resumed = model.stream(tmp_path, memory=HostMemory(stream_bytes(killed, model.expected)))
    check(resumed, model.expected, model.blocks[killed_at:])
    assert len(list(tmp_path.iterdir())) == SAMPLES - 1
    other = Model(model.transformer, seed=1)
    check(other.stream(tmp_path, memory=HostMemory(0)), other.expected, other.blocks)


def test_streams_of_two_transformers_share_folder_and_memory_and_keep_apart(tmp_path):
    pipe = tiny_pipeline("wan 2.2 a14b", num_layers=3)
    models = [Model(pipe.transformer), Model(pipe.transformer_2, seed=1)]
    memory = HostMemory(0)
    streams = [
        model.stream(tmp_path, memory=memory, component=component, prefix=f"{component}-")
        for model, component in zip(models, ("transformer", "transformer_2"), strict=True)
    ]
    memory.give_back(stream_bytes(streams[0], models[0].expected))  # one sample in memory, five on the disk
    for block in (0, 1, 0):
        for stream, model in zip(streams, models, strict=True):
            check(stream, model.expected, [block])
    for stream, model in zip(streams, models, strict=True):  # neither has overwritten the other
        check(stream, model.expected, [0])
    assert len(list(tmp_path.iterdir())) == 2 * SAMPLES - 1
    streams[0].close()
    check(streams[1], models[1].expected, [0, 1])


def test_a_pass_pages_out_each_block_once_it_is_done(model, tmp_path):
    paged_out = []
    stream = model.stream(tmp_path, page_out=paged_out.append)
    stream.advance(model.blocks[-1])
    names = block_names(model.transformer, family_of(model.transformer))
    assert paged_out == [model.transformer.get_submodule(name) for name in names[:-1]]


def test_a_store_replaces_tensors_in_memory_and_on_disk_and_gives_memory_back(tmp_path):
    memory = HostMemory(100)
    store = TensorStore(tmp_path, "x", memory=memory)
    small, large = {"a": torch.arange(10.0)}, {"a": torch.arange(100.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    for index, (tensors, left, files) in enumerate([(small, 60, 0), (large, 60, 1), (small, 20, 1)]):
        store.put(index, tensors)
        assert (memory.left, len(list(tmp_path.iterdir()))) == (left, files)
    store.put(1, {"a": torch.zeros(5)})
    assert (memory.left, list(tmp_path.iterdir())) == (0, []), "the file is gone when there is room"
    store.put(0, large)
    assert memory.left == 40
    assert store.get(0).keys() == large.keys()
    assert all(equal(store.get(0)[name], tensor) for name, tensor in large.items())
    assert torch.equal(store.get(1)["a"], torch.zeros(5))
    assert torch.equal(store.get(2)["a"], small["a"])
    store.clear()
    assert (memory.left, list(tmp_path.iterdir())) == (100, [])
