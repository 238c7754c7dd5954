"""The house: which room may know which, what is documented, and what starts fast."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fallline as fl

SOURCE = Path(fl.__file__).parent
# A room may import from the rooms named here, and from itself.
KNOWS = {
    "losses": set(),
    "optim": set(),
    "evidence": set(),
    "tasks": {"losses"},
    "training": {"tasks", "optim", "losses"},
    "sweeps": {"training", "tasks", "optim", "losses", "evidence", "reports"},
    "reports": {"evidence"},
    "diagnosis": {"training", "tasks", "optim", "losses"},
    "lessons": set(),
    "cli": {"diagnosis", "training", "tasks", "optim", "losses", "evidence", "reports", "sweeps", "lessons"},
}


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[1] for name in names if name.startswith("fallline.") and name.count(".")}
    return found & KNOWS.keys()


@pytest.mark.parametrize("room", KNOWS)
def test_arrows_point_downwards(room):
    for path in (SOURCE / room).rglob("*.py"):
        assert imports(path) <= KNOWS[room] | {room}, path.name


def test_there_is_a_line_for_every_room():
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} == KNOWS.keys()


def test_files_have_a_subject():
    for path in set(SOURCE.rglob("*.py")) - set((SOURCE / "lessons" / "pages").iterdir()):
        assert path.stem not in {"utils", "helpers", "common", "misc", "manager"}
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} does not say what it holds"
        assert len(path.read_text().splitlines()) <= 500, f"{path} has more than one subject"


def test_every_public_name_is_documented():
    modules = [fl, fl.losses, fl.optim, fl.schedules, fl.tasks, fl.metrics, fl.evidence, fl.diagnosis]
    for module in modules:
        names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
        for name in names:
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("fallline")
            if ours and (inspect.isfunction(value) or inspect.isclass(value)):
                assert inspect.getdoc(value), f"{module.__name__}.{name}"


def test_rules_never_leave_the_tensors():
    """Whatever is called `rule` or `apply` in a family of optimizers computes with tensors alone."""
    called = set()
    for path in (SOURCE / "optim").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name in {"rule", "apply", "evaluation"}:
                called |= {
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call)
                }
    assert "lerp" in called, "the scan sees calls"
    assert not called & {"item", "float", "int", "bool", "tolist", "numpy"}


def test_an_unknown_name_of_the_package_tells_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'sweep'"):
        fl.sweeep  # noqa: B018


def test_importing_fallline_imports_nothing_heavy():
    code = "import sys, fallline; print([m for m in ('torch', 'numpy', 'polars', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
