"""Whether this machine can run the GPU tests."""

from __future__ import annotations


def _why_not() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability(0) != (9, 0):
        return f"device 0 is {torch.cuda.get_device_name(0)}, the kernels need compute capability 9.0"
    return ""


WHY_NOT = _why_not()
