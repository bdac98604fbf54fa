import inspect as introspection
import subprocess
import sys

import pytest

import s2q

VERBS = ("compare", "evaluate", "generate", "inspect", "load", "plan", "quantize")


def run(code: str) -> str:
    """Run Python in a fresh process, since what matters is what has been imported before."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_verb_is_there_and_documented():
    assert set(s2q.__all__) == {*VERBS, "__version__"}
    assert set(VERBS) <= set(dir(s2q))
    for name in VERBS:
        verb = getattr(s2q, name)
        assert callable(verb)
        assert "Returns:" in introspection.getdoc(verb)


def test_unknown_attribute_names_what_there_is():
    with pytest.raises(AttributeError, match="quantize"):
        _ = s2q.quantise


def test_import_is_light():
    assert run("import s2q, sys; print({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules))") == "set()"


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
        "assert not any(type(finder).__module__.startswith('s2q') for finder in sys.meta_path)"
    )
    assert run(code) == "S2QQuantizer S2QConfig"
