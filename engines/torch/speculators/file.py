"""The directory of a speculator: `speculator.json`, which says what it is and what it fits, and
`speculator.safetensors`.

Matrices are stored as in a draft's file: `X.int8` with `X.scale`, weight = int8 × the scale of its
row. `vocab` is int32[H], rising: the tokens that the speculator can propose. All other tensors, in
float32, with d the target's hidden size:

    medusa, for each head K   heads.K.weight [d, d]   heads.K.bias [d]
    eagle3                    fc.weight [d, 3d]
                              embed_norm [d]   feature_norm [d]   mlp_norm [d]   out_norm [d]
                              q_proj.weight [heads·w, 2d]   k_proj, v_proj.weight [kv heads·w, 2d]
                              o_proj.weight [d, heads·w]   head.weight [H, d]
                              gate_proj, up_proj.weight [m, d]   down_proj.weight [d, m]

Formulas: `engines.torch.speculators.medusa` and `.eagle3`. Everything is in the target's own basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bus.protocol.errors import ModelError
from engines.catalog.sources import SPECULATOR_CONFIG
from engines.torch.draft_file import dequantise, quantise
from engines.torch.sources import first_line

WEIGHTS = "speculator.safetensors"
FORMAT = "e2sci-speculator-1"
MEDUSA, EAGLE3 = "medusa", "eagle3"
"""The kinds, as `Method.speculator` names them."""

Shapes = dict[str, tuple[int, ...]]
_Size = Annotated[int, Meta(ge=1, le=1 << 24)]
_Count = Annotated[int, Meta(ge=1, le=1024)]
_Positive = Annotated[float, Meta(gt=0)]


class SpeculatorConfig(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What `speculator.json` says.

    Attributes:
        hidden: d, hidden size of the target. vocab_size: its number of real tokens.
        tokenizer_digest, target: of the target it was trained on; the latter is its name.
        feature_layers: after how many layers features were read; of Medusa they are unused.
    """

    format: Literal["e2sci-speculator-1"] = "e2sci-speculator-1"
    hidden: _Size
    vocab_size: _Size
    tokenizer_digest: str
    target: str
    feature_layers: tuple[int, int, int]

    @property
    def kind(self) -> str:
        """`medusa` or `eagle3`."""
        return str(self.__struct_config__.tag)

    def shapes(self, num_tokens: int) -> Shapes:
        """Of every tensor but `vocab`, which has `num_tokens` entries."""
        raise NotImplementedError


class MedusaConfig(SpeculatorConfig, frozen=True, kw_only=True, tag=MEDUSA):
    """Of Medusa: `num_heads` heads, the k-th for the k-th token after the next."""

    num_heads: _Count

    def shapes(self, num_tokens: int) -> Shapes:
        """As `SpeculatorConfig.shapes`."""
        del num_tokens
        size = self.hidden
        weights: Shapes = {f"heads.{k}.weight": (size, size) for k in range(self.num_heads)}
        return {**weights, **{f"heads.{k}.bias": (size,) for k in range(self.num_heads)}}


class Eagle3Config(SpeculatorConfig, frozen=True, kw_only=True, tag=EAGLE3):
    """Of EAGLE-3: its layer, by transformers' names."""

    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Size
    intermediate_size: _Size
    rope_theta: _Positive
    rms_norm_eps: _Positive

    def __post_init__(self) -> None:
        """Raises ValueError, which reading turns into a ModelError, for impossible heads."""
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_attention_heads} heads of width {self.head_dim} cannot share "
                f"{self.num_key_value_heads} key heads; expected an even width and a multiple"
            )

    def shapes(self, num_tokens: int) -> Shapes:
        """As `SpeculatorConfig.shapes`."""
        size, gated = self.hidden, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "fc.weight": (size, 3 * size),
            "q_proj.weight": (queries, 2 * size),
            "k_proj.weight": (keys, 2 * size),
            "v_proj.weight": (keys, 2 * size),
            "o_proj.weight": (size, queries),
            "gate_proj.weight": (gated, size),
            "up_proj.weight": (gated, size),
            "down_proj.weight": (size, gated),
            "head.weight": (num_tokens, size),
            **{f"{name}_norm": (size,) for name in ("embed", "feature", "mlp", "out")},
        }


AnyConfig = MedusaConfig | Eagle3Config


@dataclass(frozen=True, slots=True)
class SpeculatorFile:
    """A directory whose config and tensor shapes were checked; its weights are not read yet.

    Attributes:
        vocab: int64[H], rising.
    """

    directory: Path
    config: AnyConfig
    vocab: Tensor

    @classmethod
    def open(cls, directory: Path) -> SpeculatorFile:
        """Check a directory.

        Raises:
            ModelError: something is missing, damaged or of another format.
        """
        config = _read_config(directory / SPECULATOR_CONFIG)
        weights = directory / WEIGHTS
        try:
            with safe_open(weights, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
                vocab = file.get_tensor("vocab") if "vocab" in found else torch.empty(0)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read {weights}: {first_line(error)}; train the speculator again"
            ) from None
        _check_vocab(vocab, config.vocab_size, weights)
        _check_shapes(found, config.shapes(vocab.numel()), weights)
        return cls(directory, config, vocab.long())

    def tensors(self) -> dict[str, Tensor]:
        """All but `vocab`, in float32.

        Raises:
            ModelError: the file cannot be read.
        """
        try:
            stored = load_file(self.directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"cannot read {self.directory / WEIGHTS}: {first_line(error)}"
            ) from None
        stored.pop("vocab")
        return dequantise(stored, torch.float32)


def save_speculator(directory: Path, config: AnyConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a directory, which is made if it is not there.

    Args:
        tensors: of the shapes above, matrices in float; `vocab` among them.
    """
    stored: dict[str, Tensor] = {"vocab": tensors["vocab"].int().cpu().contiguous()}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().float().contiguous()
        if name != "vocab" and plain.ndim == 2:
            stored[f"{name}.int8"], stored[f"{name}.scale"] = quantise(plain)
        elif name != "vocab":
            stored[name] = plain
    directory.mkdir(parents=True, exist_ok=True)
    save_file(stored, directory / WEIGHTS)
    (directory / WEIGHTS).chmod(0o644)  # safetensors makes it the owner's alone
    text = msgspec.json.format(msgspec.json.encode(config), indent=2)
    (directory / SPECULATOR_CONFIG).write_bytes(text + b"\n")


def _read_config(path: Path) -> AnyConfig:
    try:
        config: AnyConfig = msgspec.json.decode(path.read_bytes(), type=AnyConfig)
    except OSError:
        raise ModelError(
            f"{path.parent} holds no speculator: {path.name} cannot be read; expected a directory "
            "that `e2sci train` wrote"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} does not describe a speculator of format {FORMAT}: {first_line(error)}; train "
            "it again"
        ) from None
    return config


def _check_vocab(vocab: Tensor, vocab_size: int, weights: Path) -> None:
    whole = vocab.dtype == torch.int32 and vocab.ndim == 1 and vocab.numel() > 0
    if (
        not whole
        or not bool((vocab[1:] > vocab[:-1]).all())
        or not 0 <= vocab[0] <= vocab[-1] < (vocab_size)
    ):
        raise ModelError(
            f"{weights}: 'vocab' must be rising int32 token ids below {vocab_size}; train the "
            "speculator again"
        )


def _check_shapes(found: Shapes, expected: Shapes, weights: Path) -> None:
    stored: Shapes = {"vocab": found["vocab"]}
    for name, shape in expected.items():
        if len(shape) == 2:
            stored[f"{name}.int8"], stored[f"{name}.scale"] = shape, shape[:1]
        else:
            stored[name] = shape
    for name in sorted(stored.keys() | found.keys()):
        if stored.get(name) != found.get(name):
            raise ModelError(
                f"{weights}: tensor {name!r} has shape {found.get(name)}, expected "
                f"{stored.get(name)}; train the speculator again"
            )
