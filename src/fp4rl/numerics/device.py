"""Which accelerator is here, by the names that torch has for all of them."""

import torch


def accelerator() -> torch.device | None:
    """Return the kind of accelerator that models compute on (CUDA, an NPU); Apple's is none: it has no float64."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return None if kind is None or kind.type == "mps" else kind


def is_recording(device: torch.device) -> bool:
    """Return whether a graph of `device` is being recorded, which will replay the present kernels and no Python."""
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())
