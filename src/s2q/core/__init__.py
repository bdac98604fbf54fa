"""The arithmetic: schemes, quantization parameters, packing, codebooks, tokens, the input path."""
