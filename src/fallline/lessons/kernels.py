"""Kernels: how they are started, each in a process of its own, and reached through sockets of the file system."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from fallline.lessons.kernel_process import MEMORY


class OurSpec(KernelSpecManager):  # type: ignore[misc]
    """The one kernel that there is: this Python, with the settings of `kernel_process`."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The same, whatever its name."""
        command = [sys.executable, "-m", "fallline.lessons.kernel_process", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python", interrupt_mode="signal")


def manager(folder: Path, name: str) -> AsyncKernelManager:
    """The manager of a kernel that is not started yet.

    Args:
        folder: for its sockets; only its owner may enter it.
        name: of the kernel, unique in the folder.
    """
    return AsyncKernelManager(
        transport="ipc", connection_file=str(folder / f"{name}.json"), kernel_spec_manager=OurSpec()
    )


async def start(kernel: AsyncKernelManager, folder: Path, memory: int = 0) -> None:
    """Starts a kernel.

    Args:
        folder: that its code runs in.
        memory: bytes that it may take; 0 for no bound.
    """
    environment: dict[str, Any] = {**os.environ}
    environment.pop(MEMORY, None)
    if memory:
        environment[MEMORY] = str(memory)
    await kernel.start_kernel(cwd=str(folder), env=environment)
