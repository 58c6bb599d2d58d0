"""How much memory a process or a device has free, asked before it is filled."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from hlwq_formats.errors import TooLittleMemory


def check_memory(needed: int, device: torch.device, path: str, weights: str) -> None:
    """Raise TooLittleMemory (74) when `device` has fewer than `needed` bytes free; nothing where that is unknown."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise TooLittleMemory(
            f'weights="{weights}" takes {needed / 1e9:.2f} GB, {max(free, 0) / 1e9:.2f} GB are free on {device}',
            file=path,
            hint='use weights="packed" or a smaller dtype' if weights == "dense" else "use another device",
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken: of the device, or of what Linux and the control group leave to the process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return _least_free(Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


def _least_free(meminfo: Path, membership: Path, root: Path) -> int | None:
    found = []
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))
        group = root / line[3:].lstrip("/")
        # the limit may be that of any group above; a container sees its own as the root
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                with contextlib.suppress(OSError, ValueError):  # "max" is no number
                    limit = int((folder / "memory.max").read_text())
                    found.append(limit - int((folder / "memory.current").read_text()))
    return min(found, default=None)
