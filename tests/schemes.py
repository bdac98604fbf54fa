"""Quantization schemes that tests take: `scheme(4, 6, group_size=8)` is w4g8a6."""

from s2q.core.schemes import LinearScheme, PerChannel, PerGroup, PerToken, QuantScheme


def weights(num_bits=4, *, group_size=None, levels="uniform"):
    granularity = PerChannel() if group_size is None else PerGroup(group_size=group_size)
    return QuantScheme(num_bits=num_bits, granularity=granularity, levels=levels)


def activations(num_bits=6, *, group_size=None, levels="uniform", delta=None):
    granularity = PerToken() if group_size is None else PerGroup(group_size=group_size)
    return QuantScheme(num_bits=num_bits, granularity=granularity, dynamic=True, levels=levels, delta=delta)


def scheme(weight=4, activation=6, *, group_size=None):
    """Weights per channel or in groups; inputs per token, or in full precision where `activation` is None."""
    quantized = None if activation is None else activations(activation)
    return LinearScheme(weight=weights(weight, group_size=group_size), activation=quantized)
