import inspect as introspection
import subprocess
import sys

import pytest

import s2q

VERBS = ("bench", "compare", "convert", "evaluate", "export", "generate", "inspect", "load", "plan", "push", "quantize")


REQUIRED = introspection.Parameter.empty
EXCEPTIONS = {
    ("generate", "prompts"): "there is nothing to generate without",
    ("generate", "seeds"): "a video a prompt, where judging takes two",
    ("inspect", "verify"): "hashing every file is asked for",
    ("bench", "model"): "None is all published models",
}
"""Parameters that differ in type or default from those of the same name in other verbs."""


def run(code: str) -> str:
    """Run Python in a fresh process, since what matters is what has been imported before."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_verb_is_there_and_documented():
    assert set(s2q.__all__) == {*VERBS, "Config", "__version__"}
    assert set(VERBS) <= set(dir(s2q))
    for name in VERBS:
        verb = getattr(s2q, name)
        assert callable(verb)
        assert "Returns:" in introspection.getdoc(verb)


def parameters(verb):
    return introspection.signature(getattr(s2q, verb)).parameters


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_a_model_or_entries_and_keywords(verb):
    first, *options = parameters(verb).values()
    assert first.name == ("entries" if verb == "compare" else "model")
    assert first.kind is introspection.Parameter.POSITIONAL_OR_KEYWORD
    assert all(option.kind is introspection.Parameter.KEYWORD_ONLY for option in options)
    assert all(option.annotation is not REQUIRED for option in (first, *options))


def test_a_word_has_one_type_and_one_default_in_all_verbs():
    shared = {}
    for verb in VERBS:
        for name, parameter in parameters(verb).items():
            if (verb, name) not in EXCEPTIONS:
                shared.setdefault(name, []).append(parameter)
    for name, uses in shared.items():
        defaults = {use.default for use in uses if use.default is not REQUIRED}
        assert len(defaults) <= 1, f"{name}: {defaults}"
        types = {use.annotation.removesuffix(" | None") for use in uses}
        narrowest = min(types, key=len)
        assert name == "model" or len(types) == 1, f"{name}: {types}"
        assert all(kind.startswith(narrowest) for kind in types), f"{name}: {types}"


def test_quantize_shows_every_option_with_its_default():
    defaults = {name: parameter.default for name, parameter in parameters("quantize").items()}
    assert defaults == {
        "model": REQUIRED,
        "recipe": REQUIRED,
        "out": None,
        "prompts": None,
        "samples": None,
        "overrides": (),
        "seed": 0,
        "device": "cpu",
        "dtype": None,
        "variant": None,
        "loras": (),
        "max_shard_size": "10GB",
        "memory_budget": None,
        "workers": "auto",
        "devices": None,
        "engine": "processes",
        "ray_address": None,
        "offload": "auto",
        "resume": True,
        "overwrite": False,
        "dry_run": False,
        "progress": None,
    }


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_argument_is_a_type_error(verb):
    with pytest.raises(TypeError, match="divice"):
        getattr(s2q, verb)("shapes-cogvideox", divice="cpu")


def test_unknown_attribute_names_what_there_is():
    with pytest.raises(AttributeError, match="quantize"):
        _ = s2q.quantise


def test_import_is_light():
    assert run("import s2q, sys; print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))") == "set()"


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import s2q; import diffusers.quantizers.auto",
        "import s2q.checkpoint",
        "import s2q.generation.load",
    ],
)
def test_diffusers_knows_the_format_in_whatever_order_the_imports_come(imports):
    code = (
        f"{imports}\n"
        "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "import sys\n"
        "print(AUTO_QUANTIZER_MAPPING['s2q'].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING['s2q'].__name__)\n"
        "waiting = [f.names for f in sys.meta_path if type(f).__module__.startswith('s2q')]\n"
        "assert waiting in ([], [('transformers.quantizers.auto',)])"
    )
    assert run(code) == "S2QQuantizer S2QConfig"
