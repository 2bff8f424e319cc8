"""Which number format and which device a model runs in.

`auto` means bfloat16 where the hardware multiplies it natively and float32 elsewhere: on a CPU
without bf16 instructions every product would be emulated, at a tenth of the speed.
"""

from __future__ import annotations

import torch

from bus.errors import ConfigurationError

DTYPE_CHOICES = ("auto", "float32", "bfloat16")
DEVICE_CHOICES = ("auto", "cpu", "cuda")


def resolve_device(device: str) -> torch.device:
    """Settings value → device. `auto` takes the GPU where there is one.

    Raises:
        ConfigurationError: not one of DEVICE_CHOICES (an index, as in `cuda:1`, is welcome), or
            CUDA asked for where there is none.
    """
    kind, _, index = device.partition(":")
    if kind not in DEVICE_CHOICES or (index and not (kind == "cuda" and index.isdecimal())):
        raise ConfigurationError(
            f"device {device!r} is unknown; use one of {', '.join(DEVICE_CHOICES)}"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "device 'cuda' was asked for, but torch sees no GPU here; use device 'cpu', or install "
            "a CUDA build of torch"
        )
    if kind == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Settings value → dtype of weights and activations on this device.

    In float32, products are kept in full float32 as well (no TF32, no bf16 shortcuts): the
    exactness of DESIGN rule 6 rests on it. The setting is torch's and holds for the process.

    Raises:
        ConfigurationError: not one of DTYPE_CHOICES.
    """
    if dtype not in DTYPE_CHOICES:
        raise ConfigurationError(
            f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPE_CHOICES)}"
        )
    if dtype == "bfloat16" or (dtype == "auto" and has_native_bfloat16(device)):
        return torch.bfloat16
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.float32


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() or torch.cpu._is_amx_tile_supported())
