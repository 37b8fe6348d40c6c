"""The first NVIDIA GPU, asked of the driver itself: neither CUDA Python nor a framework is needed."""

from __future__ import annotations

import ctypes


def compute_capability() -> str | None:
    """The compute capability of the first GPU as ``8.7``, None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    return f"{major.value}.{minor.value}" if not any(asked) else None
