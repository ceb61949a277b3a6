"""Says where measurements are made: versions, hardware, and what its matrix products reach."""

import argparse
from typing import Any

import torch

from cfpretrain.base import runtime
from tools.measuring.common import dtype_of, seconds_of

_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A product of large bf16 matrices (fp32 on a CPU)."""
    device = runtime.pick_device()
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype_of(device)) for _ in range(2))
    tflops = 2 * size**3 / seconds_of(lambda: a @ b, 10, device) / 1e12
    return {"device": device.type, "matmul_tflops": tflops}
