"""Peak memory of a piece of work: of the accelerator, where torch uses one, and of the process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Begin anew. Where the system cannot forget a process's peak, it stays that of its whole life."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size
    cuda = cuda_in_use()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def peak_bytes() -> dict[str, int]:
    """Bytes since :func:`reset_peak`: ``process`` (resident), and ``device`` where torch uses CUDA."""
    peaks = {"process": _resident()}
    cuda = cuda_in_use()
    if cuda is not None:
        peaks["device"] = int(cuda.max_memory_allocated())
    return peaks


def cuda_in_use() -> Any:
    """torch.cuda, if torch is imported and has begun to use it."""
    torch: Any = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _resident() -> int:
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
