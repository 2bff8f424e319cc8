"""Which number format and which device a model runs in.

`auto` means int8 for the models this project names, on a CPU; for others bfloat16 where
the hardware multiplies it natively and float32 elsewhere: on a CPU without bf16 instructions every
product would be emulated, at a tenth of the speed.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from bus.protocol.errors import ConfigurationError

DEVICE_CHOICES = ("auto", "cpu", "cuda")


class NumberFormat(StrEnum):
    """Of weights and products. In INT8 activations between products are float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


DTYPE_CHOICES = ("auto", *NumberFormat)


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


def resolve_format(dtype: str, device: torch.device, registered: bool = False) -> NumberFormat:
    """Settings value → number format on this device.

    Args:
        registered: whether the model is one that this project names (`engines.catalog.registry`),
        or was
            converted to int8 already.

    Raises:
        ConfigurationError: not one of DTYPE_CHOICES, or int8 where it does not run.
    """
    if dtype not in DTYPE_CHOICES:
        raise ConfigurationError(
            f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPE_CHOICES)}"
        )
    on_cpu = device.type == "cpu"
    if dtype == NumberFormat.INT8 and not on_cpu:
        raise ConfigurationError(
            f"dtype 'int8' runs on a CPU, not on {device.type!r}; use float32 or bfloat16 here"
        )
    if dtype != "auto":
        return NumberFormat(dtype)
    if registered and on_cpu:
        return NumberFormat.INT8
    return NumberFormat.BFLOAT16 if has_native_bfloat16(device) else NumberFormat.FLOAT32


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Settings value → dtype of a model in floating point, for training and for the module tree.

    In float32, products are kept in full float32 as well (no TF32, no bf16 shortcuts): exactness
    rests on it. The setting is torch's and holds for the process.

    Raises:
        ConfigurationError: not one of DTYPE_CHOICES, or int8.
    """
    number_format = resolve_format(dtype, device)
    if number_format is NumberFormat.INT8:
        raise ConfigurationError(
            "dtype 'int8' only runs models; here one is trained or read in floating point: use "
            "float32 or bfloat16"
        )
    return torch_dtype(number_format)


def torch_dtype(number_format: NumberFormat) -> torch.dtype:
    """What a model of the module tree is loaded in; for int8 float32, to be rounded."""
    if number_format is NumberFormat.BFLOAT16:
        return torch.bfloat16
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.float32


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() or torch.cpu._is_amx_tile_supported())
