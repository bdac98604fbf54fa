"""Seeds that depend on names and not on the order of calls, so that any block or video can be redone on its own."""

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """Derive an independent seed from a base seed and what it is for: `derive_seed(0, "prompt", 3)`.

    A number and its decimal string are different parts. The seed is in [0, 2^63), the same on every machine.
    """
    digest = hashlib.sha256()
    for part in (seed, *parts):
        text = f"{'s' if isinstance(part, str) else 'i'}{part}".encode()
        digest.update(f"{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
