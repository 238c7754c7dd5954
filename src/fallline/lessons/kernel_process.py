"""What a kernel's process does first: it bounds its memory, and says how figures and tracebacks are to look.

python -m fallline.lessons.kernel_process -f CONNECTION_FILE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MEMORY = "FALLLINE_KERNEL_MEMORY"
"""The environment variable with the bytes that a kernel may take; without it, it may take all."""

MATPLOTLIBRC = Path(__file__).parent / "assets" / "matplotlibrc"


def main() -> None:
    """Runs a kernel until it is told to end, or the process that started it is gone."""
    _bound_memory()
    # One thread: numbers do not depend on how many cores there are, and several kernels leave each other room.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["MATPLOTLIBRC"] = str(MATPLOTLIBRC)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    sys.path[0] = ""  # the kernel's folder, not this one
    from ipykernel.kernelapp import IPKernelApp
    from traitlets.config import Config

    config = Config()
    config.InlineBackend.figure_formats = {"svg"}
    config.InteractiveShell.colors = "nocolor"
    config.HistoryManager.enabled = False
    IPKernelApp.launch_instance(argv=sys.argv[1:], config=config)


def _bound_memory() -> None:
    """Lets an allocation beyond the bound fail in the kernel, as a MemoryError, before the machine runs out."""
    limit = int(os.environ.get(MEMORY, 0))
    if limit and sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
