from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.torch.cache import KVCache
from engines.torch.integer_decoder import convert
from engines.torch.linears import integer, packed
from engines.torch.network import CausalNetwork
from engines.torch.probe import probe
from engines.torch.weights import MappedWeights
from tests.engines.tiny import random_model

CPU = torch.device("cpu")


def network(model: Any) -> CausalNetwork:
    return CausalNetwork(convert(model.config, MappedWeights(model.state_dict())), 203, integer)


class Spoiled:
    """A network whose logits have another last bit in passes of `size` tokens."""

    rowwise = True

    def __init__(self, inner: CausalNetwork, size: int) -> None:
        self._inner, self._size = inner, size

    def logits(self, input_ids: Tensor, cache: KVCache, num_rows: int) -> Tensor:
        rows = self._inner.logits(input_ids, cache, num_rows).clone()
        if len(input_ids) == self._size:
            rows[0, 0] = torch.nextafter(rows[0, 0], torch.tensor(torch.inf))
        return rows


def test_int8_is_bitwise_and_its_digest_tells_models_apart() -> None:
    first, second = random_model(), random_model(rms_norm_eps=1e-3)
    found = probe(network(first), 203, CPU)
    assert found.bitwise
    assert probe(network(first), 203, CPU) == found
    assert probe(network(second), 203, CPU).digest != found.digest
    with torch.no_grad():
        first.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert probe(network(first), 203, CPU).digest != found.digest


def test_one_bit_in_any_kind_of_pass_shows() -> None:
    inner = network(random_model())
    for size in (1, 2, 5, 6, 8):
        assert not probe(Spoiled(inner, size), 203, CPU).bitwise
    assert probe(Spoiled(inner, 3), 203, CPU).bitwise  # a size it does not run


def test_a_network_that_is_not_rowwise_is_never_called_bitwise() -> None:
    """Eight tokens may agree where forty do not."""
    agreeing = Spoiled(network(random_model()), 3)
    agreeing.rowwise = False
    assert not probe(agreeing, 203, CPU).bitwise
    floating = CausalNetwork(random_model(vocab_size=203), 203, packed)
    assert not probe(floating, 203, CPU).bitwise


def test_a_small_vocabulary_will_do() -> None:
    assert probe(network(random_model(vocab_size=5)), 5, CPU).bitwise
