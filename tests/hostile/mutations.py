"""Mutations of a checkpoint's files, of recipes and of prompt files: functions of a seed, the same in every process.

A mutation of bytes is blind (truncate, flip, insert, …); one of a format knows it: values of JSON of another type, huge
or deep, headers of safetensors that lie, tensors with NaN, anchors and tags of YAML, control characters in prompts.
"""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

DEPTH = 10**5
HUGE = 10**6
PATHS = ["", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[31m", "\u202e", "é" * 50]
TEXTS = [*PATHS, "x" * HUGE, "nan", "1e999", "-1"]
NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 10**18, 10**400, -(10**18), 0.5, 1e308, float("nan"), float("inf"), -0.0]

WHOLE_JSON = [b"[]", b"null", b"3", b"{}", b"[" * DEPTH, b'{"a":' * DEPTH, b'"a"', b"[" * DEPTH + b"]" * DEPTH]
DEEP_JSON = ["[" * DEPTH + "]" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH, "1" * 10**5, "NaN", "-Infinity"]

HEADERS = [b"{}", b"[]", b"null", b"[" * DEPTH, b'{"a":' * DEPTH, b" " * HUGE, b"\xff" * 99]
DTYPES = ["F16", "F32", "BF16", "U8", "I8", "F64", "I64", "BOOL", "F8_E4M3", "X", "", None, 3]
SHAPES = [None, "3", [None], [1.5], [True], {"a": 1}, [[3]], [10**400], [], [0], [-1], [2**62, 4], [HUGE] * 5]
VALUES = "ff 00 807f 0000c07f 0000807f 000080ff 7f cdcc4c7e c07f 000080bf 01000000 9976967e".split()
"""Bytes that fill a tensor: NaN, infinite, zero, negative, subnormal and huge values of bf16 and fp32."""

YAML = [
    "[" * DEPTH,
    "- - -",
    "9" * 5000,
    "x" * HUGE,
    "|\n  text",
    ">-\n  a\n  b",
    "'\\x1b[2J'",
    '"\\u202e"',
    '"\\0"',
    "\t4",
]
YAML += "*b11 &a ?a !!binary !!set 1e400 .nan .inf -1 0 1:20 0x10 yes null '' [] <<:*a %YAML 2026-11-28 ' é @a".split()
YAML += [
    "!!python/object/apply:os.system ['touch CANARY']",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['CANARY']]",
    "!!python/name:os.system",
    "!!python/module:evil_module",
]
EXTENDS = ["s2q-w4a6", "../x", "mine", "'\\0'", "[a]", "s2q-w4a9"]

CONTROLS = "\0 \x1b[31m \x07 \x0b \x7f \u202e \u2066 \u200f \ufeff \u200b \U0001f984 \U0010ffff \ufffe".split(" ")
CONTROLS += ["\x0c", "\x85", "\u2028", "\t"]
MARKUP = ["<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n", "$(touch x)", "';--", "\\", "$x^2$", "[/red]"]


def blind(content: bytes, random_: random.Random) -> bytes:
    """Another content, without regard to what it means."""
    size = len(content)
    at, length = random_.randrange(size + 1), random_.choice([1, 2, 7, 64, 1000])
    before, inside, after = content[:at], content[at : at + length], content[at + length :]
    changes: list[Callable[[], bytes]] = [
        lambda: before,
        lambda: inside + after,
        lambda: before + after,
        lambda: before + inside * 2 + after,
        lambda: before + random_.randbytes(length) + inside + after,
        lambda: before + random_.randbytes(length) + after,
        lambda: before + bytes(length) + after,
        lambda: flipped(content, random_),
        lambda: flipped(content, random_),
        lambda: flipped(content, random_),
        lambda: bytes(size),
        lambda: random_.randbytes(size),
        lambda: content + random_.randbytes(length),
        lambda: content * 2,
        lambda: "\ufeff".encode() + content,
    ]
    return random_.choice(changes)()


def flipped(content: bytes, random_: random.Random) -> bytes:
    """A content with one bit changed."""
    changed = bytearray(content)
    if changed:
        changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def json_text(content: bytes, random_: random.Random) -> bytes:
    """A JSON document in which something is of another type, missing, renamed, huge or deep."""
    document = json.loads(content)
    places = [([], document)]
    for keys, value in places:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        places += [([*keys, key], inner) for key, inner in items]
    keys, value = random_.choice(places[1:] or places)
    kind = random_.randrange(10)
    if not keys or kind == 0:
        return random_.choice(WHOLE_JSON)
    parent = document
    for key in keys[:-1]:
        parent = parent[key]
    if kind == 1:
        del parent[keys[-1]]
    elif kind == 2 and isinstance(parent, dict):
        parent[random_.choice([*PATHS, "auto_map", "_class_name", "unknown"])] = parent.pop(keys[-1])
    elif kind == 3:
        parent[keys[-1]] = "\x01here\x01"
        marked = json.dumps(parent[keys[-1]]).encode()
        return dumped(document).replace(marked, random_.choice(DEEP_JSON).encode())
    elif kind == 4 and isinstance(value, int | float):
        parent[keys[-1]] = value * random_.choice([10, 1000, 10**9]) + random_.choice([0, 1])
    else:
        parent[keys[-1]] = random_.choice([None, True, False, [], {}, [[]], {"a": 1}, [1, 2], *TEXTS, *NUMBERS])
    return dumped(document)


def dumped(document: object) -> bytes:
    """JSON in UTF-8, lone surrogates and all."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def safetensors(content: bytes, random_: random.Random) -> bytes:
    """A safetensors file whose header lies, or whose tensors have values that they cannot have."""
    (length,) = struct.unpack("<Q", content[:8])
    header, payload = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    name, other = random_.choice(names), random_.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]

    def with_length(number: int) -> bytes:
        return struct.pack("<Q", number) + content[8:]

    def with_header(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + bytes(payload)

    def written(**changes: object) -> bytes:
        entry.update(changes)
        return with_header(dumped(header))

    def filled(pattern: bytes) -> bytes:
        count = random_.choice([len(pattern), end - start])
        payload[start : start + count] = (pattern * (end - start))[:count]
        return with_header(dumped(header))

    def renamed() -> bytes:
        header[random_.choice([*TEXTS, f"{name}.x", name.upper()])] = header.pop(name)
        return with_header(dumped(header))

    def dropped() -> bytes:
        del header[name]
        header.pop("__metadata__", None)
        for rest in header.values():
            rest["data_offsets"] = [at - (end - start) * (at > start) for at in rest["data_offsets"]]
        del payload[start:end]
        return with_header(dumped(header))

    def swapped() -> bytes:
        header[name], header[other] = header[other], header[name]
        return with_header(dumped(header))

    def twice() -> bytes:
        text = dumped(header)
        return with_header(text[:-1] + b", " + dumped(name) + b": " + dumped(header[other]) + b"}")

    def many() -> bytes:
        empty = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
        return with_header(dumped({**header, **{f"t{index}": empty for index in range(20000)}}))

    lengths = [0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8, len(content)]
    shapes = [*SHAPES, entry["shape"][::-1], [1, *entry["shape"]]]
    offsets = [[0, 0], [end, start], [-1, end], [start, end + 1], [start, 2**63], [0, end], [], None, ["a", "b"]]
    changes: list[Callable[[], bytes]] = [
        lambda: with_length(random_.choice(lengths)),
        lambda: with_header(random_.choice(HEADERS)),
        lambda: written(shape=random_.choice(shapes)),
        lambda: written(shape=random_.choice(shapes)),
        lambda: written(dtype=random_.choice(DTYPES)),
        lambda: written(data_offsets=random_.choice(offsets)),
        lambda: filled(bytes.fromhex(random_.choice(VALUES))),
        lambda: filled(bytes.fromhex(random_.choice(VALUES))),
        renamed,
        dropped,
        swapped,
        twice,
        many,
    ]
    return random_.choice(changes)()


def yaml_text(content: bytes, random_: random.Random, canary: Path) -> bytes:
    """A recipe with what YAML can do at its worst."""
    lines = content.decode().splitlines()
    at = random_.randrange(len(lines))
    before, line, after = lines[:at], lines[at], lines[at + 1 :]
    key = line.partition(":")[0]
    bomb = [f"b{level}: &b{level} [{', '.join([f'*b{level - 1}'] * 9)}]" for level in range(1, 12)]
    value = random_.choice(YAML).replace("CANARY", str(canary))
    changes: list[Callable[[], list[str]]] = [
        lambda: [*before, f"{key}: {value}", *after],
        lambda: [*before, f"{key}: {value}", *after],
        lambda: [*before, f"{key}: {value}", *after],
        lambda: ["b0: &b0 [a, a, a]", *bomb, *before, f"{key}: *b11", *after],
        lambda: [*lines, *lines],
        lambda: [*before, *after],
        lambda: [*before, "  " + line, *after],
        lambda: [*before, line.upper(), *after],
        lambda: [*lines, "---", *lines],
        lambda: [*lines, "extends: " + random_.choice(EXTENDS)],
        lambda: [*lines, "# a comment", ""],
        lambda: random_.sample(lines, len(lines)),
        lambda: ["- " * 10**4],
        lambda: ["? " * 10**4],
    ]
    return "\n".join(random_.choice(changes)()).encode("utf-8", "surrogatepass")


def prompt_text(content: bytes, random_: random.Random) -> bytes:
    """A prompt file with characters, lines and encodings that no editor writes."""
    text = content.decode()
    lines = text.split("\n")
    at = random_.randrange(len(lines))
    before, line, after = lines[:at], lines[at], lines[at + 1 :]
    mark = random_.choice([*CONTROLS, *MARKUP])
    long = random_.choice(["a", "a ", "é", mark]) * HUGE
    broken = [b"\xc0\xaf", b"\xff\xfe", b"\xf4\x90\x80\x80", b"\xe2\x80", b"\xed\xa0\x80 surrogate"]
    changes: list[Callable[[], bytes]] = [
        lambda: "\n".join([*before, line + mark + "x", *after]).encode(),
        lambda: "\n".join([*before, line + mark + "x", *after]).encode(),
        lambda: "\n".join([*before, mark, *after]).encode(),
        lambda: "\n".join([*before, long, *after]).encode(),
        lambda: ("\ufeff" + "\r\n".join(lines)).encode(),
        lambda: "\r".join(lines).encode(),
        lambda: ("\n" * HUGE + text).encode(),
        lambda: text.encode(random_.choice(["utf-16", "utf-32", "utf-7", "cp037"]), "replace"),
        lambda: content + random_.choice(broken),
        lambda: "\n".join([*lines, *lines]).encode(),
        lambda: "\n".join(f"#{line}" for line in lines).encode(),
        lambda: "\n".join(f"{line} {index}" for index in range(5000) for line in lines[:4]).encode(),
    ]
    return random_.choice(changes)()
