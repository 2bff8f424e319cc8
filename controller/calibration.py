"""A calibration as one file: predictor, neutral credit, safe thresholds, and what they hold for."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bus.protocol.errors import ConfigurationError
from decoding.credit import REFERENCE_WINDOW, CreditLaw, interpolated_neutral
from decoding.predictor import NUM_LAYERS, Layers, NeuralPredictor

FORMAT = "e2sci-calibration-2"


class About(msgspec.Struct, frozen=True):
    """What a calibration holds for.

    Attributes:
        target, draft: names of the models. tokenizer_digest: of both.
        data: what was asked. link: over which network. date: ISO 8601. method: how it was run.
        neutral: W → τ(W). edges: of the bins of credit. safe: the greatest threshold of each bin
            that keeps quality, in nats.
        table: what all of it was made of, as JSON that the controller does not look into;
            `training.calibration.table.Table.from_json` reads it.
    """

    target: str
    draft: str
    tokenizer_digest: str
    data: str
    link: str
    date: str
    num_windows: int
    neutral: dict[int, float]
    edges: tuple[float, ...]
    safe: tuple[float, ...]
    table: msgspec.Raw
    format: str = FORMAT


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `e2sci calibrate` has found for a pair."""

    about: About
    layers: Layers

    def law(self, law: CreditLaw) -> CreditLaw:
        """`law` with this calibration's neutral credit, predictor and safety check."""
        about = self.about

        def neutral(window: int) -> float:
            return interpolated_neutral(about.neutral, window)

        def safe(credit: float) -> float:
            return about.safe[bisect.bisect_right(about.edges, credit)]

        predictor = NeuralPredictor(self.layers, neutral(REFERENCE_WINDOW))
        return replace(law, neutral=neutral, predictor=predictor, safe=safe)

    def mismatch(self, target: str, draft: str, tokenizer_digest: str) -> str | None:
        """Why it does not hold for this pair; None where it does."""
        about = self.about
        for what, own, other in (
            ("tokenizer", about.tokenizer_digest, tokenizer_digest),
            ("target", about.target, target),
            ("draft", about.draft, draft),
        ):
            if own != other:
                return f"it was made for the {what} {own}, here is {other}"
        return None

    def save(self, path: Path) -> None:
        """Write it."""
        tensors = {}
        for index, (weight, bias) in enumerate(self.layers):
            tensors[f"layer.{index}.weight"] = weight.astype(np.float32)
            tensors[f"layer.{index}.bias"] = bias.astype(np.float32)
        save_file(tensors, path, {"about": msgspec.json.encode(self.about).decode()})


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        ConfigurationError: there is no such file, or it is another one.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = msgspec.json.decode((file.metadata() or {})["about"], type=About)
            layers = tuple(
                (
                    file.get_tensor(f"layer.{index}.weight").astype(np.float64),
                    file.get_tensor(f"layer.{index}.bias").astype(np.float64),
                )
                for index in range(NUM_LAYERS)
            )
    except (OSError, KeyError, SafetensorError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} is no calibration: {error}") from error
    if about.format != FORMAT or len(about.safe) != len(about.edges) + 1:
        raise ConfigurationError(f"{path} is a calibration of another version; calibrate again")
    return Calibration(about, layers)
