"""What holds for every module of the source."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import s2q

ROOT = Path(s2q.__file__).parent
TRAINING = Path(__file__).parents[1] / "training"
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def module_name(path, root=ROOT):
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


def run_time_nodes(tree):
    """Every node outside `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        for child in node.orelse if is_type_checking(node) else [node]:
            yield child
            yield from run_time_nodes(child)


def imported_modules(tree, names):
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in names else node.module for name in inner)


def import_cycle(trees):
    graph = {name: {other for other in imported_modules(tree, trees) if other in trees} for name, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def reads_or_writes_pickles(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in modules if name.partition(".")[0] in PICKLERS)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            function = ast.unparse(node.func)
            options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if (
                function == "torch.save"
                or (function == "torch.load" and options.get("weights_only") is not True)
                or (function in ("np.load", "numpy.load") and options.get("allow_pickle") is not False)
            ):
                yield ast.unparse(node)


@pytest.fixture(scope="module")
def trees():
    return {
        module_name(path, root): ast.parse(path.read_text(encoding="utf-8"))
        for root in (ROOT, TRAINING)
        for path in sorted(root.rglob("*.py"))
    }


def test_no_module_reads_or_writes_pickles(trees):
    assert {name: calls for name, tree in trees.items() if (calls := list(reads_or_writes_pickles(tree)))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "def f():\n    import shelve",
        "torch.save(x, path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_a_pickle_is_noticed(source):
    assert list(reads_or_writes_pickles(ast.parse(source)))


def test_modules_import_each_other_in_no_cycle(trees):
    assert import_cycle(trees) is None


def test_a_cycle_through_a_function_is_noticed_and_one_for_types_is_not():
    back = "def f():\n    from s2q.a import x"
    types = "if TYPE_CHECKING:\n    from s2q.a import x"
    first = ast.parse("from s2q import b")
    assert set(import_cycle({"s2q.a": first, "s2q.b": ast.parse(back)})) == {"s2q.a", "s2q.b"}
    assert import_cycle({"s2q.a": first, "s2q.b": ast.parse(types)}) is None


def test_durations_are_of_a_clock_that_is_never_set(trees):
    """The time of day is written into events and nothing else."""
    clocks = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    callers = {
        name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in clocks
    }
    assert callers == {"s2q.common.run_folder"}


MOST_LINES = 80
MOST_LINES_OF_A_FILE = 500


def lines_of(function, *, counts_docstring=True):
    """Lines from `def` to the end; the signature counts."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring and not counts_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def long_functions(tree, *, public=()):
    """Functions of more than 80 lines; the docstring of a public verb, which documents its options, is not counted."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    counted = [(node.name, lines_of(node, counts_docstring=node.name not in public)) for node in functions]
    return [(name, lines) for name, lines in counted if lines > MOST_LINES]


def test_functions_have_at_most_80_lines(trees):
    public = {name: {attribute} for name, attribute in s2q._LAZY.values()}
    found = {name: long for name, tree in trees.items() if (long := long_functions(tree, public=public.get(name, ())))}
    assert found == {}


def test_a_long_function_is_noticed_and_the_docstring_of_a_verb_is_not_counted():
    body = "\n".join(["    x = 1"] * 79)
    docstring = '    """One.\n\n    Two.\n    """\n'
    assert long_functions(ast.parse(f"def f():\n{body}")) == []
    tree = ast.parse(f"def f():\n{docstring}{body}")
    assert long_functions(tree) == [("f", 84)]
    assert long_functions(tree, public={"f"}) == []


def test_files_have_at_most_500_lines():
    paths = [path for root in (ROOT, TRAINING) for path in root.rglob("*.py")]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: count for path, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}
