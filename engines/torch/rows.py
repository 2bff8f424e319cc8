"""Logits of a pass → the few numbers that judging needs, on the device that holds them.

A row of 50,000 logits is reduced to the probabilities of the K tokens the draft proposed; the full
row leaves the device only for a draw. The warped distribution is that of
`decoding.sampling.warp_dense`: temperature, top-k, top-p; ties by rising id.

Precision: exponentials of float32 differences from the row's maximum, summed in float64. A
probability is off by less than 1e-6 of itself, of which float32 logits already cost a part.

On a CPU what comes of a row has the same bits whatever rows are reduced with it and on however many
threads: sums are `engines.torch.rowwise.exp_sum`, and single probabilities are numpy's, whose
exponentials do not depend on an element's place. On other devices sums are the device's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bus.protocol.arrays import Float16Array, Float32Array, Float64Array, Int32Array
from bus.protocol.errors import LocalError
from decoding.coupling import choose
from decoding.engine import NO_PROBS, NUM_TOP, Choice, TargetRow, Want
from decoding.sampling import SamplingParams, num_kept
from engines.torch.rowwise import exp_sum

Int64Array = npt.NDArray[np.int64]

_FIRST_LOOK = 512
"""Candidates looked at for top-p before the whole row is sorted [ours]. Rows of real text rarely
need more; numpy sorts such a row in a tenth of torch's time on a CPU."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The target's distributions at R consecutive positions.

    Attributes:
        logits: float32[R, V] on the model's device, real tokens only.
        sampling: how they are warped.
        peak: float32[R], the rows' maxima.
        mass: float64[R], sums over kept tokens of exp((logit − peak)/T); unused when greedy.
        cutoff: float32[R] and int64[R]: a token is kept if its logit is above the cutoff, or
            equal to it with an id not above the second number. None where nothing is cut.
        states: float[R, hidden] after the last norm, or None. features: float16[R, 3, hidden] of
            their positions (`decoding.engine.TargetRow`), None where the pass was not asked.
    """

    logits: Tensor
    sampling: SamplingParams
    peak: Tensor
    mass: Tensor
    cutoff: tuple[Tensor, Tensor] | None
    states: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def of(
        cls, logits: Tensor, sampling: SamplingParams, states: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Rows:  # fmt: skip
        """From float[R, V] logits, R ≥ 1, with states and features if there are any."""
        wide = logits.float()
        peak = wide.amax(dim=1)
        mass, cutoff = torch.ones_like(peak, dtype=torch.float64), None
        if not sampling.greedy and sampling.untruncated:
            mass = _mass(wide, peak, sampling.temperature)
        elif not sampling.greedy:
            mass, cutoff = _truncate(wide, peak, sampling)
        return cls(wide, sampling, peak, mass, cutoff, states, features)

    def __len__(self) -> int:
        return int(self.logits.shape[0])

    def only(self, index: int) -> Rows:
        """Row `index` alone."""
        one = slice(index, index + 1)
        cutoff = None if self.cutoff is None else (self.cutoff[0][one], self.cutoff[1][one])
        states = None if self.states is None else self.states[one]
        features = None if self.features is None else self.features[one]
        return Rows(
            self.logits[one], self.sampling, self.peak[one], self.mass[one], cutoff, states,
            features,
        )  # fmt: skip

    def reduce(self, wants: Sequence[Want]) -> list[TargetRow]:
        """One `TargetRow` for each row."""
        mass = self.mass if self.sampling.plain else _mass(self.logits, self.peak, 1.0)
        masses, peaks, best = mass.tolist(), self.peak.tolist(), self._argmax()
        p1, warped = self._at_ids([want.ids for want in wants], mass)
        choices = [
            None if want.choice_at is None else self._choice(row, want.choice_at)
            for row, want in enumerate(wants)
        ]
        return [
            TargetRow(
                best[row],
                p1[row],
                warped[row],
                1.0 / masses[row],
                log_sum_exp=peaks[row] + math.log(masses[row]),
                gap=self._gap(row) if want.gap else None,
                choice=choices[row],
                top=self._top(row, masses[row]) if want.top else None,
                full=self.dense(row) if want.full else None,
                hidden=self._hidden(row) if want.hidden else None,
                entropy=self._entropy(row) if want.entropy else None,
                features=self._features(row) if want.features else None,
                scored=self._scored(row, want, choices[row], masses[row]) if want.top else (),
            )
            for row, want in enumerate(wants)
        ]

    def _argmax(self) -> list[int]:
        """Of each row; of equals the first. On a CPU numpy finds it in a tenth of torch's time."""
        if self.logits.device.type == "cpu":
            return [int(row.argmax()) for row in self.logits.numpy()]
        best: list[int] = self.logits.argmax(dim=1).tolist()
        return best

    def _at_ids(
        self, row_ids: Sequence[Int32Array], mass: Tensor
    ) -> tuple[Sequence[Float64Array], Sequence[Float64Array]]:
        """For each row its probabilities at some ids, at temperature 1 and warped; the latter none
        at temperature 0."""
        width = max(asked.size for asked in row_ids)
        if not width:
            none = [NO_PROBS] * len(row_ids)
            return none, none
        padded = np.zeros((len(row_ids), width), dtype=np.int64)
        for row, asked in enumerate(row_ids):
            padded[row, : asked.size] = asked
        at_ids = self.logits.gather(1, torch.from_numpy(padded).to(self.logits.device))
        values, peak = at_ids.cpu().numpy(), self.peak.cpu().numpy()
        p1 = np.exp((values - peak[:, None]).astype(np.float64)) / mass.cpu().numpy()[:, None]
        warped = p1 if self.sampling.plain else self._warp(values, padded, slice(None))
        sizes = [asked.size for asked in row_ids]
        return (
            [p1[row, :size] for row, size in enumerate(sizes)],
            [warped[row, : 0 if self.greedy else size] for row, size in enumerate(sizes)],
        )

    def _gap(self, row: int) -> float:
        first, second = self.logits[row].topk(2).values.tolist()
        return float(first - second)

    def _choice(self, row: int, position: int) -> Choice:
        if self.greedy:
            return Choice(int(self.logits[row].argmax()), self._gap(row))
        logits, kept = self.logits[row].cpu().numpy(), None
        if self.cutoff is not None:
            value, last_id = (part[row].cpu().numpy() for part in self.cutoff)
            kept = np.flatnonzero(logits >= value)
            kept = kept[(logits[kept] > value) | (kept <= last_id)]
        return choose(logits, self.sampling.temperature, self.sampling.seed, position, kept)

    def _top(self, row: int, mass: float) -> tuple[Int32Array, Float64Array]:
        size = min(NUM_TOP, self.logits.shape[1])
        logits = self.logits[row].cpu().numpy()
        (able,) = np.nonzero(logits >= np.partition(logits, -size)[-size])  # all of a tie
        able = able[np.lexsort((able, -logits[able]))[:size]]
        below = (logits[able] - logits[able[0]]).astype(np.float64)
        return able.astype(np.int32), below - np.log(mass)

    def _scored(
        self, row: int, want: Want, choice: Choice | None, mass: float
    ) -> tuple[tuple[int, float], ...]:
        """Temperature-1 log-probabilities of the tokens asked for, and of the choice."""
        tokens = (*want.scored, *(() if choice is None else (choice.token,)))
        logits = self.logits[row].cpu().numpy()
        below = (logits[list(tokens)] - logits.max()).astype(np.float64)
        return tuple(zip(tokens, (below - np.log(mass)).tolist(), strict=True))

    def _hidden(self, row: int) -> Float32Array:
        if self.states is None:
            raise LocalError("this architecture gives no hidden states")
        return self.states[row].float().cpu().numpy()

    def _features(self, row: int) -> Float16Array:
        if self.features is None:
            raise LocalError("this architecture or this pass gives no features")
        return self.features[row].cpu().numpy()

    def _entropy(self, row: int) -> float:
        """In nats at temperature 1: ln Z − Σ p·x over x = logit − peak, Z = Σ exp x, in float64."""
        logits = self.logits[row].cpu().numpy()
        below = (logits - logits.max()).astype(np.float64)
        weights = np.exp(below)
        mass = float(weights.sum())
        return math.log(mass) - float((weights * below).sum()) / mass

    @property
    def greedy(self) -> bool:
        return self.sampling.greedy

    def dense(self, index: int) -> Float64Array:
        """float64[V], warped p of row `index`; one-hot on the argmax at temperature 0."""
        one = slice(index, index + 1)
        logits = self.logits[one].cpu().numpy()
        if self.greedy:
            probs = np.zeros(logits.shape[1])
            probs[int(logits.argmax())] = 1.0
            return probs
        row: Float64Array = self._warp(logits, np.arange(logits.shape[1])[None], one)[0]
        return row

    def _warp(self, logits: Float32Array, ids: Int64Array, rows: slice) -> Float64Array:
        """float64[n, K]: warped probabilities of tokens `ids`, int64[n, K], of some rows, from
        their float32[n, K] logits; zeros at temperature 0."""
        if self.greedy:
            return np.zeros(logits.shape)
        peak, mass = self.peak[rows].cpu().numpy(), self.mass[rows].cpu().numpy()
        below = (logits - peak[:, None]).astype(np.float64)
        probs: Float64Array = np.exp(below / self.sampling.temperature) / mass[:, None]
        if self.cutoff is None:
            return probs
        value, last_id = (part[rows, None].cpu().numpy() for part in self.cutoff)
        probs[(logits < value) | ((logits == value) & (ids > last_id))] = 0.0
        return probs


def _mass(logits: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """float64[R]: Σ exp((logit − peak)/T) over each row."""
    scaled = logits - peak[:, None]
    if temperature != 1.0:
        scaled /= temperature
    return exp_sum(scaled)


def _truncate(
    logits: Tensor, peak: Tensor, sampling: SamplingParams
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mass of the kept tokens and the cutoff, see `Rows`."""
    total = _mass(logits, peak, sampling.temperature).cpu().numpy()
    num_rows, vocab_size = logits.shape
    heads = logits.topk(min(sampling.top_k or _FIRST_LOOK, vocab_size)).values.cpu().numpy()
    mass = np.empty(num_rows)
    value = np.empty(num_rows, dtype=np.float32)
    last_id = np.empty(num_rows, dtype=np.int64)
    for row in range(num_rows):
        ranked, weights = heads[row], _weights(heads[row], sampling.temperature)
        if not sampling.top_k and weights.sum() <= sampling.top_p * total[row]:
            ranked = np.sort(logits[row].cpu().numpy())[::-1]
            weights = _weights(ranked, sampling.temperature)
        kept = _num_kept(weights / total[row], sampling)
        mass[row] = weights[:kept].sum()
        value[row] = ranked[kept - 1]
        last_id[row] = vocab_size
        if kept == ranked.size or ranked[kept] == value[row]:  # maybe a tie that is cut in two
            num_equal = int((ranked[:kept] == value[row]).sum())
            last_id[row] = torch.nonzero(logits[row] == float(value[row]))[num_equal - 1, 0]
    device = logits.device
    cutoff = (torch.from_numpy(value).to(device), torch.from_numpy(last_id).to(device))
    return torch.from_numpy(mass).to(device), cutoff


def _weights(ranked: Float32Array, temperature: float) -> Float64Array:
    """float64[n]: exp((logit − peak)/T) of logits sorted falling."""
    wide = ranked.astype(np.float64)
    weights: Float64Array = np.exp((wide - wide[0]) / temperature)
    return weights


def _num_kept(probs: Float64Array, sampling: SamplingParams) -> int:
    """As `decoding.sampling.num_kept`, for the head of a row sorted falling: without top-k, the
    mass behind the head must stay in the denominator."""
    if sampling.top_k:
        return num_kept(probs, sampling)
    return min(int(np.searchsorted(np.cumsum(probs), sampling.top_p)) + 1, probs.size)
