"""Which device trains, and what is said of one that is not there."""

from __future__ import annotations

import torch

from fallline.errors import DeviceUnavailable


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; `auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        DeviceUnavailable: for a device that this machine does not have, or that does not exist at all.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceUnavailable(f"there is no device {str(name)!r}: give auto, cpu, cuda or cuda:N.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceUnavailable(f"fallline does not train on {str(name)!r}: give auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        has = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise DeviceUnavailable(f"{str(name)!r} is not there: this machine has {has}. Give device='cpu' or 'auto'.")
    return torch.device("cuda", index)


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of the generator from which a model on this device draws."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def with_generators(device: torch.device) -> list[torch.device]:
    """What `torch.random.fork_rng` has to put back beside the CPU's generator when a model runs on this device."""
    return [device] if device.type == "cuda" else []
