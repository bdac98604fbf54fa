"""Variants of a recipe, in groups: what `ablations.py` ranks and `reproduce` sets beside the paper."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table: a recipe with changes.

    Attributes:
        name: File name.
        label: What the table says.
        recipe: Name of a recipe of the package.
        overrides: As of ``--set``.
    """

    name: str
    label: str
    recipe: str
    overrides: tuple[str, ...] = ()


_UNTRAINED = ("distillation=null", "clip={}", "loss={}", "transforms.learn_scale=false", "calibration.selection=rtfp")
_CONSTANT_CLIP = {"w4a4": 0.77, "w4a6": 0.95}  # the first by the prototype, the second where its learned ones stayed


def _parts(width: str) -> list[Variant]:
    """Rounding, and each part of the method added in turn, everything else as in the recipe."""
    recipe = f"s2q-{width}"
    nearest, hadamard = "rounding.method=rtn", "transforms.rotation=hadamard"
    no_scale, no_rotation = "transforms.scale=none", "transforms.rotation=identity"
    clip = f"clip.constant={_CONSTANT_CLIP[width]}"
    uniform, random = "loss={}", "calibration.selection=rtfp"
    rows = [
        ("hadamard-gptq", "Hadamard + GPTQ, no scale", (*_UNTRAINED, hadamard, no_scale)),
        ("parts-1-scale", "scale", (*_UNTRAINED, nearest, no_rotation)),
        ("parts-2-hadamard", "+ Hadamard", (*_UNTRAINED, nearest, hadamard)),
        ("parts-3-gptq", "+ GPTQ", (*_UNTRAINED, hadamard)),
        ("parts-4-constant-clip", f"+ constant clip {_CONSTANT_CLIP[width]}", (*_UNTRAINED, hadamard, clip)),
        ("parts-5-learned-clips", "+ learned clips", (uniform, random, hadamard, "transforms.learn_scale=false")),
        ("parts-6-learned-kronecker", "+ learned scale and Kronecker", (uniform, random)),
        ("selection-rtfp", "+ STD", (random,)),
    ]
    return [
        Variant(name=f"rtn-{width}", label="rounding to nearest, adaLN too", recipe=f"rtn-{width}"),
        *(Variant(name=f"{recipe}-{n}", label=label, recipe=recipe, overrides=tuple(o)) for n, label, o in rows),
        Variant(name=recipe, label=f"+ SDS = `{recipe}`", recipe=recipe),
    ]


def _sweep(recipe: str, key: str, values: list[object], *, default: object) -> list[Variant]:
    """One field of a recipe over several values; its own value is the recipe itself, which all sweeps share."""
    short = key.partition(".")[2].replace("_", "-")
    return [
        Variant(name=recipe, label=f"`{key}={value}` (the recipe's)", recipe=recipe)
        if value == default
        else Variant(
            name=f"{recipe}-{short}-{value}", label=f"`{key}={value}`", recipe=recipe, overrides=(f"{key}={value}",)
        )
        for value in values
    ]


def _beyond(width: str) -> list[Variant]:
    """What is not in the paper, each part alone and together."""
    recipe, shift, branch = f"s2q-{width}", "transforms.shift=mean", "transforms.low_rank=32"
    bar = (*_UNTRAINED, "transforms.rotation=hadamard", "transforms.scale=none")
    from_input = "transforms.low_rank_from=input"
    rows = [
        ("hadamard-gptq", "Hadamard + GPTQ", bar),
        ("hadamard-gptq-shift", "Hadamard + GPTQ + shift", (*bar, shift)),
        ("hadamard-gptq-shift-low-rank", "Hadamard + GPTQ + shift + low-rank branch", (*bar, shift, branch)),
        ("", f"`{recipe}`", ()),
        ("selection-coverage", "+ coverage instead of SDS", ("calibration.selection=coverage",)),
        ("shift", "+ shift", (shift,)),
        ("low-rank", "+ low-rank branch", (branch,)),
        ("n-prompts-40", "+ 40 prompts, coverage", ("calibration.n_prompts=40", "calibration.selection=coverage")),
    ]
    plus, whole = f"s2q-plus-{width}", "activations.delta=null"
    last = [Variant(name=plus, label=f"+ refinement = `{plus}`", recipe=plus)]
    if width == "w4a4":
        last = [
            Variant(name=f"{plus}-whole", label="+ refinement", recipe=plus, overrides=(whole,)),
            Variant(name=plus, label=f"+ differences from local means = `{plus}`", recipe=plus),
        ]
    return [
        *(
            Variant(name=f"{recipe}-{n}".rstrip("-"), label=label, recipe=recipe, overrides=tuple(o))
            for n, label, o in rows
        ),
        Variant(
            name=f"{plus}-without-2",
            label="+ all of them",
            recipe=plus,
            overrides=(from_input, "refinement=null", whole),
        ),
        Variant(
            name=f"{plus}-without-1",
            label="+ the branch taken from the weight too",
            recipe=plus,
            overrides=("refinement=null", whole),
        ),
        *last,
    ]


FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0}
"""How a step-distilled model is run."""


def _few_steps(recipe: str) -> list[Variant]:
    """A model that is run in few steps without guidance: calibrated so, then with defaults of the model."""
    steps, guidance = "calibration.steps=4", "calibration.guidance_scale=1"
    rows = [
        ("own", "4 steps, no guidance", (steps, guidance)),
        ("guidance", "4 steps, guidance 5", (steps,)),
        ("steps", "20 steps, no guidance", (guidance,)),
        ("default", "20 steps, guidance 5 (the model's)", ()),
    ]
    return [
        Variant(name=f"{recipe}-few-steps-{name}", label=label, recipe=recipe, overrides=overrides)
        for name, label, overrides in rows
    ]


def _rotation(recipe: str) -> list[Variant]:
    """Rotations of inputs that are twice as wide as outputs: of all 768 channels (24 x 32), then of blocks of 32."""
    return [
        Variant(
            name=f"{recipe}-rotation-{name}",
            label=label,
            recipe=recipe,
            overrides=(f"transforms.block_size={block_size}",),
        )
        for name, label, block_size in [("whole", "all channels", 0), ("blocks", "blocks of 32 channels", 32)]
    ]


GROUPS: dict[str, list[Variant]] = {
    "parts-w4a4": _parts("w4a4"),
    "parts-w4a6": _parts("w4a6"),
    "beyond-w4a4": _beyond("w4a4"),
    "beyond-w4a6": _beyond("w4a6"),
    "selection": _sweep(
        "s2q-w4a4", "calibration.selection", ["atop", "atfp", "rtfp", "ds", "qs", "sds"], default="sds"
    ),
    "lambda-min": _sweep("s2q-w4a4", "loss.lambda_min", [0, 0.2, 0.5, 0.8, 1], default=0.5),
    "samples": _sweep("s2q-w4a4", "calibration.samples", [20, 40, 80], default=40),
    "epochs": _sweep("s2q-w4a4", "distillation.epochs", [2, 5, 15, 30], default=15),
    "precision": [
        Variant(
            name=f"s2q-w4a6-precision-{precision}",
            label=f"`calibration.precision={precision}`",
            recipe="s2q-w4a6",
            overrides=(f"calibration.precision={precision}",),
        )
        for precision in ("float32", "bfloat16")
    ],
    "few-steps": _few_steps("s2q-w4a8"),
    "rotation": _rotation("s2q-w4a6"),
}

JUDGED: dict[str, dict[str, float]] = {"few-steps": FEW_STEPS}
"""Generation settings that a group is judged with, other than the model's; its first variant is the base."""
