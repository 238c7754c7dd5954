"""Tasks by reference: a built-in name, `path/to/file.py:attribute`, or `package.module:attribute`."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from fallline.errors import FalllineError, InvalidTask, UnknownName, nearest
from fallline.tasks import quadratic, signals, tabular, text
from fallline.tasks.task import Task

registry: Mapping[str, Callable[[], Task]] = {
    "line": tabular.line,
    "digits": tabular.digits,
    "digits_cnn": tabular.digits_cnn,
    "diabetes": tabular.diabetes,
    "two_moons": tabular.two_moons,
    "mnist1d": signals.mnist1d,
    "mnist1d_cnn": signals.mnist1d_cnn,
    "quadratic_deep": quadratic.quadratic_deep,
    "char_lm": text.char_lm,
}
"""Every built-in task: its name and the function that makes it."""


def describe_builtins() -> list[tuple[str, str]]:
    """The name of each built-in task and a line about it, without making any data.

    >>> describe_builtins()[0]
    ('line', 'A straight line through 3 points: y = 2x at 1, 2, 3; one linear layer, squared error, full
    batch.')
    """
    return [(name, (make.__doc__ or "").strip().splitlines()[0]) for name, make in registry.items()]


def resolve(reference: str) -> Task:
    """The task that a reference names.

    Args:
        reference: a built-in name, `path/to/file.py:attribute`, or `package.module:attribute`. The attribute
            is a `Task`, or a function without arguments that returns one. A file sees its own folder for
            imports, a module the current directory, as under `python file.py` and `python -m package.module`.

    Raises:
        UnknownName: for a name, a file or an attribute that does not exist, with the nearest one.
        InvalidTask: for a file or module that does not import, with its own error, and for an attribute that
            is no task.

    >>> resolve("line").name
    'line'
    """
    location, colon, attribute = reference.rpartition(":")
    if not colon or not location or not attribute:
        return _builtin(reference)
    is_file = location.endswith(".py") or "/" in location or "\\" in location
    module = _from_file(Path(location)) if is_file else _from_module(location)
    found = _attribute(module, attribute, location)
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except FalllineError:
            raise
        except Exception as error:
            raise InvalidTask(f"{reference} was called to make a task and fails: {_told(error)}") from error
    if not isinstance(found, Task):
        raise InvalidTask(
            f"{reference} is a {type(found).__name__}, and a fallline.Task is expected, or a function "
            "without arguments that returns one."
        )
    return found


def _builtin(name: str) -> Task:
    if name in registry:
        return registry[name]()
    place = name.rstrip(":")
    if place.endswith(".py"):
        raise UnknownName(f"{name} names a file without the task in it. Add the task's name: {place}:task.")
    raise UnknownName(
        f"There is no task {name!r}. {nearest(name, registry)} A task of your own is named by "
        "file.py:attribute or package.module:attribute."
    )


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [each.name for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = f" {nearest(path.name, siblings)}" if siblings else ""
        raise UnknownName(f"There is no file {path}.{hint}")
    path = path.resolve()
    # A name of its own, so that a file called like an installed package does not stand for it.
    name = f"_fallline_task_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidTask(f"{path} is no Python file; its name is expected to end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    with _on_path(path.parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise InvalidTask(f"{path} does not import: {_told(error)}") from error
    return module


def _from_module(name: str) -> ModuleType:
    with _on_path(Path.cwd()):
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise UnknownName(
                    f"There is no module {name!r}: {error}. Check its spelling, start from the folder that "
                    "holds it, or name the file: path/to/file.py:attribute."
                ) from error
            raise InvalidTask(f"The module {name} does not import: {_told(error)}") from error
        except (Exception, SystemExit) as error:
            raise InvalidTask(f"The module {name} does not import: {_told(error)}") from error


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _attribute(module: ModuleType, name: str, location: str) -> object:
    if hasattr(module, name):
        found: object = getattr(module, name)
        return found
    tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
    known = tasks or [key for key in vars(module) if not key.startswith("_")]
    hint = nearest(name, known) if known else "It defines nothing."
    raise UnknownName(f"{location} has no {name!r}. {hint}")


def _told(error: BaseException) -> str:
    """An error of somebody else's code in a line: its type, its message and where it happened."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    outside = [each for each in frames if "importlib" not in each.filename and each.filename != __file__]
    place = f" ({Path(outside[-1].filename).name}, line {outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {error}{place}"
