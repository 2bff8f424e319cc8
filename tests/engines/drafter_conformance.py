"""What every drafter must do, as `tests.engines.conformance` does for targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bus.protocol.errors import LocalError
from decoding.engine import Drafter
from decoding.sampling import SamplingParams, from_wire
from tests.engines.conformance import GREEDY, PLAIN, WARPED


def _go_on() -> bool:
    return False


class DrafterConformance:
    """Of a `decoding.engine.Drafter` that always has something to say after `REPEATING`."""

    REPEATING = (7, 8, 9, 10, 11, 12, 13, 14, 30, 31, 7, 8, 9, 10, 11)

    @pytest.mark.parametrize("sampling", [GREEDY, WARPED])
    def test_what_is_drafted_is_a_function_of_the_text(
        self, drafter: Drafter[Any], sampling: SamplingParams
    ) -> None:
        cache = drafter.open(sampling, self.REPEATING)
        whole = drafter.draft(cache, self.REPEATING, 5, frozenset(), _go_on)
        assert whole.start == len(self.REPEATING)
        assert len(whole.tokens) == 5
        assert whole.num_cached == drafter.length(cache) < whole.start + 5
        cache, text = drafter.open(sampling, self.REPEATING), list(self.REPEATING)
        drafter.prefill(cache, text[:9])
        for size in (2, 1, 2):
            window = drafter.draft(cache, text[drafter.length(cache) :], size, frozenset(), _go_on)
            text += window.tokens
        assert tuple(text[len(self.REPEATING) :]) == whole.tokens

    def test_each_token_can_be_drawn_from_what_is_sent(self, drafter: Drafter[Any]) -> None:
        cache = drafter.open(PLAIN, self.REPEATING)
        window = drafter.draft(cache, self.REPEATING, 4, frozenset(), _go_on)
        assert window.q_ids.shape == window.q_probs.shape
        assert window.q_ids.dtype == np.int32
        assert window.q_probs.dtype == np.float16
        for token, ids, probs in zip(window.tokens, window.q_ids, window.q_probs, strict=True):
            assert from_wire(ids, probs).prob(token) > 0

    def test_it_stops_when_told_and_after_the_end(self, drafter: Drafter[Any]) -> None:
        cache = drafter.open(GREEDY, self.REPEATING)
        free = drafter.draft(cache, self.REPEATING, 3, frozenset(), _go_on).tokens
        cache = drafter.open(GREEDY, self.REPEATING)
        ended = drafter.draft(cache, self.REPEATING, 3, frozenset({free[0]}), _go_on)
        assert ended.tokens == free[:1]
        cache = drafter.open(GREEDY, self.REPEATING)
        asked = iter((False, True))
        assert (
            drafter.draft(cache, self.REPEATING, 3, frozenset(), lambda: next(asked)).tokens
            == (free[:1])
        )
        cache = drafter.open(GREEDY, self.REPEATING)
        none = drafter.draft(cache, self.REPEATING, 3, frozenset(), lambda: True)
        assert none.tokens == ()

    def test_after_a_rollback_the_text_decides(self, drafter: Drafter[Any]) -> None:
        cache = drafter.open(GREEDY, self.REPEATING)
        drafter.draft(cache, (*self.REPEATING, 20, 21), 2, frozenset(), _go_on)
        drafter.keep(cache, min(len(self.REPEATING), drafter.length(cache)))
        text = (*self.REPEATING, 12)
        again = drafter.draft(cache, text[drafter.length(cache) :], 2, frozenset(), _go_on)
        other = drafter.open(GREEDY, self.REPEATING)
        assert again.tokens == drafter.draft(other, text, 2, frozenset(), _go_on).tokens
        with pytest.raises(LocalError):
            drafter.keep(cache, 99)

    def test_sessions_do_not_see_each_other(self, drafter: Drafter[Any]) -> None:
        one, other = drafter.open(GREEDY), drafter.open(GREEDY)
        drafter.prefill(other, (1, 2, 3, 4, 5, 6, 7, 8))
        expected = drafter.draft(one, self.REPEATING, 2, frozenset(), _go_on).tokens
        drafter.close(one)
        drafter.close(other)
        alone = drafter.open(GREEDY)
        assert drafter.draft(alone, self.REPEATING, 2, frozenset(), _go_on).tokens == expected
