"""Traced programs as machine code: compiled ahead of time by torch's own compiler, and kept between runs.

A program is exported and compiled by TorchInductor into one file, which loads in milliseconds, into as many processes
as there are, and is called without a check of its arguments: they are what it was compiled for, because it is known by
their shapes. So nothing is ever compiled again while training goes on. Compiling itself happens in processes of its
own, side by side; what they leave behind when they fail is a reason.

The cache is `$FALLLINE_CACHE`, or `fallline/programs` in the user's cache directory. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fallline.sweeps import wrapper
from fallline.sweeps.products import LINEAR
from fallline.sweeps.programs import Run, copy_of
from fallline.sweeps.workers import cores, forked

# Of the cache; the files that were used longest ago go first.
LARGEST_CACHE = 2**29
# What the compiler is told beside its defaults. What is computed once per row (a bias correction) is kept for the whole
# row: computed again for every element, a power costs more than the update itself.
OPTIONS = {"realize_opcount_threshold": 0, "realize_reads_threshold": 0}
# What makes compiling quicker and programs no slower: a precompiled header takes longer than it spares; the code around
# the kernels is called once for many rows, and nobody debugs it.
QUICKER = {
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
}


class NotCompiled(Exception):
    """Why a program cannot be compiled, in a few words."""


@dataclass(frozen=True)
class Source:
    """What is compiled: a traced program, and tensors like those that it will be called with."""

    graph: fx.GraphModule
    tensors: Sequence[Tensor]

    @cached_property
    def key(self) -> str:
        """What the machine code depends on."""
        made = hashlib.sha256()
        told: list[Any] = [torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability()]
        told += [_instructions(), OPTIONS]
        told += [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in self.tensors]
        if any(t.device.type == "cuda" for t in self.tensors):
            told.append(torch.cuda.get_device_name())
        made.update(repr((told, self.graph.code)).encode())
        for name in sorted(n.target for n in self.graph.graph.nodes if n.op == "get_attr"):
            constant = getattr(self.graph, name)
            if not isinstance(constant, Tensor):
                raise NotCompiled(f"it holds {type(constant).__name__} {name!r}")
            buffer = io.BytesIO()
            torch.save(constant, buffer)
            made.update(buffer.getvalue())
        return made.hexdigest()[:32]

    @property
    def operations(self) -> int:
        """How many the program has."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)


@cache
def _instructions() -> str:
    """What this machine's processor can do: programs use all of it, and a home directory may serve several machines."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


def why_not(device: torch.device) -> str | None:
    """What keeps this machine from compiling anything, or None."""
    if sys.platform == "win32":
        return "compiling needs Linux or macOS"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler} is not installed)"
    return None


def cached(source: Source) -> Run | None:
    """The compiled program from the cache, if it is there."""
    try:
        path = _path(source.key)
    except NotCompiled:  # which compiling it will say
        return None
    if not path.exists():
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    try:
        return _loaded(path)
    except Exception:  # made by something else, or broken: it is made again
        path.unlink(missing_ok=True)
        return None


def compile_all(sources: Mapping[Any, Source], *, side_by_side: bool) -> Iterator[tuple[Any, Run | NotCompiled]]:
    """Compiles programs into the cache and loads them; yields each, or why there is none, as they are done.

    Args:
        side_by_side: in forked processes, one per core.
    """
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield from ((name, NotCompiled(f"{folder} cannot be written: {error.strerror}")) for name in sources)
        return
    _prune(folder)
    waiting = deque(sources.items())
    with contextlib.ExitStack() as stack:
        under_way: deque[tuple[Any, Source, Callable[[], None]]] = deque()
        while waiting or under_way:
            while waiting and len(under_way) < cores():
                name, source = waiting.popleft()
                wait = stack.enter_context(_compiling(source)) if side_by_side else partial(_compile, source)
                under_way.append((name, source, wait))
            name, source, wait = under_way.popleft()
            try:
                wait()
                yield name, _loaded(_path(source.key))
            except Exception as error:
                yield name, reason_of(error)


def directory() -> Path:
    """Where compiled programs are kept."""
    own = os.environ.get("FALLLINE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fallline" / "programs"


def _path(key: str) -> Path:
    return directory() / f"{key}.pt2"


def _compile(source: Source) -> None:
    """Compiles into the cache."""
    from torch._inductor import aoti_compile_and_package

    examples = tuple(copy_of(tensor) for tensor in source.tensors)
    target = _path(source.key)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder, contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_known_machine())
        stack.enter_context(_onednn_for_any_product())
        warnings.simplefilter("ignore")
        exported = torch.export.export(source.graph, examples, strict=False)
        path, options = str(Path(folder) / "program.pt2"), {**OPTIONS, **_quicker()}
        try:
            with wrapper.slim(), _first_object_beside_the_others():
                made = aoti_compile_and_package(exported, package_path=path, inductor_configs=options)
            _loaded(Path(made))(examples)
        except Exception:  # as torch does it: slower, and whatever its compiler and its loader have become since
            made = aoti_compile_and_package(exported, package_path=path, inductor_configs=options)
        Path(made).replace(target)


@contextlib.contextmanager
def _onednn_for_any_product() -> Iterator[None]:
    """Within, the compiler takes any product of oneDNN's; by itself it wants one side to be constant."""
    if LINEAR is None:
        yield
        return
    from torch._inductor import ir, lowering, mkldnn_ir
    from torch._inductor.fx_passes import mkldnn_fusion

    def lowered(*arguments: Any) -> Any:
        made: Any = mkldnn_ir.LinearUnary.create(*arguments)
        return made if isinstance(made, ir.TensorBox) else ir.TensorBox.create(made)

    mkldnn_fusion._mkldnn_fusion_init()  # what would put the compiler's own rule back later
    before = lowering.lowerings.get(LINEAR)
    lowering.lowerings[LINEAR] = lowered
    try:
        yield
    finally:
        del lowering.lowerings[LINEAR]
        if before is not None:
            lowering.lowerings[LINEAR] = before


@contextlib.contextmanager
def _first_object_beside_the_others() -> Iterator[None]:
    """Within, the first object file of a program, its wrapper, is made while its kernels are; what links them waits."""
    from torch._inductor.cpp_builder import CppBuilder

    one_by_one = CppBuilder.build
    first: list[Future[None]] = []

    def build(self: Any) -> None:
        if not first and getattr(self, "_compile_only", False):
            first.append(pool.submit(one_by_one, self))
            return
        if first and not getattr(self, "_compile_only", False):
            first.pop().result()
        one_by_one(self)

    with ThreadPoolExecutor(1) as pool:
        CppBuilder.build = build  # type: ignore[method-assign]
        try:
            yield
        finally:
            CppBuilder.build = one_by_one  # type: ignore[method-assign]


def _quicker() -> dict[str, Any]:
    """Those of the settings `QUICKER` that this version of torch has."""
    from torch._inductor import config as settings

    return {name: value for name, value in QUICKER.items() if hasattr(settings.aot_inductor, name.split(".")[1])}


def _known_machine() -> contextlib.AbstractContextManager[None]:
    """Within, torch does not spend some six seconds on trying out vector units that it knows this machine has."""
    from torch._inductor import config as settings

    known = True if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None
    manager: contextlib.AbstractContextManager[None] = settings.patch({"cpp.vec_isa_ok": known})
    return manager


def _expect_no_more_of_the_machine() -> None:
    """From here on torch does not try out instructions for int8 and bfloat16, which a program of ours has no use for.

    That is known of a process to its end, so it is not for one that compiles other programs too.
    """
    from torch._inductor import cpu_vec_isa

    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        cpu_vec_isa.VecISA.check_build = lambda *_: False  # type: ignore[method-assign]


def _loaded(path: Path) -> Run:
    # torch's own function for it compares the machine with the one where the program was made, which is in the key; for
    # that it brings half of the compiler with it, and may try out vector units: two seconds.
    make: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        loader = make(str(path), "model", False, 1, -1)
    except TypeError:  # up to torch 2.6
        loader = make(str(path), "model")

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            found: Sequence[Tensor] = loader.run(list(tensors))
        except RuntimeError as error:
            if "out of memory" in str(error):  # said by the program's own words only
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        return found

    return run


@contextlib.contextmanager
def _compiling(source: Source) -> Any:
    """A process that compiles; yields what waits for it."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = forked(_in_child, source, there, daemon=False)
    there.close()

    def wait() -> None:
        try:
            reason = here.recv()
        except EOFError:
            reason = "the compiler was killed"
        process.join()
        if reason is not None:
            raise NotCompiled(reason)

    try:
        yield wait
    finally:
        here.close()
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 9)  # with the compilers that it started
            process.join()


def _in_child(source: Source, connection: Any) -> None:
    os.setpgid(0, 0)
    reason: str | None = None
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        torch.set_num_threads(1)
        _expect_no_more_of_the_machine()
        _compile(source)
    except BaseException as error:
        reason = str(reason_of(error))
    with contextlib.suppress(OSError):
        connection.send(reason)
    os._exit(0)


def reason_of(error: BaseException) -> NotCompiled:
    """An error's type and its first line."""
    if isinstance(error, NotCompiled):
        return error
    lines = str(error).strip().splitlines()
    return NotCompiled(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _prune(folder: Path) -> None:
    """Lets the programs go that were used longest ago, when there are too many."""
    with contextlib.suppress(OSError):
        files = sorted(folder.glob("*.pt2"), key=lambda file: file.stat().st_mtime, reverse=True)
        size = 0
        for file in files:
            size += file.stat().st_size
            if size > LARGEST_CACHE:
                file.unlink(missing_ok=True)
