"""The oracle draft: the recorded answer by absolute position, wrong where it is drawn to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.protocol.errors import ConfigurationError, RequestError
from decoding.rescue import doubts
from decoding.sampling import SamplingParams, from_wire
from engines.torch.draft import LoadedDraft, load_draft
from engines.torch.oracle import (
    OracleDraft,
    RecordedAnswer,
    is_wrong,
    read_answers,
    write_answers,
)
from tests.engines.tiny import save_tiny

PROMPT = (5, 17, 99, 42)
ANSWER = (7, 120, 33, 8, 9, 10, 11, 12)
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedDraft:
    return load_draft(str(save_tiny(tmp_path_factory.mktemp("draft"))), "float32", "cpu")


def oracle(loaded: LoadedDraft, error_rate: float) -> OracleDraft:
    return OracleDraft(loaded, 48, {PROMPT: ANSWER}, error_rate)


def drafted(model: OracleDraft, seed: int, count: int) -> tuple[int, ...]:
    cache = model.open(SamplingParams(seed=seed), PROMPT)
    return model.draft(cache, PROMPT, count, NEVER, stop=lambda: False).tokens


def test_it_replays_the_answer(loaded: LoadedDraft) -> None:
    assert drafted(oracle(loaded, 0.0), seed=1, count=8) == ANSWER


def test_it_goes_on_by_position_after_a_rollback(loaded: LoadedDraft) -> None:
    model = oracle(loaded, 0.0)
    cache = model.open(SamplingParams(), PROMPT)
    model.draft(cache, PROMPT, 6, NEVER, stop=lambda: False)
    model.keep(cache, len(PROMPT) + 2)
    window = model.draft(cache, [55], 3, NEVER, stop=lambda: False)
    assert window.start == len(PROMPT) + 3
    assert window.tokens == ANSWER[3:6]


def test_it_is_wrong_where_seed_and_position_say_so(loaded: LoadedDraft) -> None:
    tokens = drafted(oracle(loaded, 0.5), seed=3, count=8)
    wrong = [is_wrong(3, len(PROMPT) + index, 0.5) for index in range(8)]
    assert [a != b for a, b in zip(tokens, ANSWER, strict=True)] == wrong
    assert 0 < sum(wrong) < 8


def test_errors_come_at_the_set_rate() -> None:
    wrong = sum(is_wrong(seed, position, 0.1) for seed in range(20) for position in range(500))
    assert 900 < wrong < 1100


def test_above_temperature_0_it_sends_one_hot_rows_as_large_as_a_models(
    loaded: LoadedDraft,
) -> None:
    model = oracle(loaded, 0.0)
    cache = model.open(SamplingParams(temperature=0.8), PROMPT)
    window = model.draft(cache, PROMPT, 2, NEVER, lambda: False)
    assert window.q_ids.shape == window.q_probs.shape == (2, 48)
    for row in range(2):
        q = from_wire(window.q_ids[row], window.q_probs[row])
        assert (q.ids.tolist(), q.probs.tolist()) == ([ANSWER[row]], [1.0])


def test_beyond_the_answer_the_network_speaks(loaded: LoadedDraft) -> None:
    tokens = drafted(oracle(loaded, 0.0), seed=1, count=10)
    assert tokens[:8] == ANSWER
    assert len(tokens) == 10


def test_an_unknown_prompt_is_refused(loaded: LoadedDraft) -> None:
    with pytest.raises(RequestError, match="no recorded answer"):
        oracle(loaded, 0.0).open(SamplingParams(), (1, 2))


def test_answers_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, [RecordedAnswer(PROMPT, ANSWER), RecordedAnswer((1,), (2,))])
    assert read_answers(path) == {PROMPT: ANSWER, (1,): (2,)}


@pytest.mark.parametrize("content", ["nonsense\n", '{"prompt": [1]}\n', '{"prompt": "a"}\n'])
def test_another_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"answers\.jsonl"):
        read_answers(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="gone"):
        read_answers(tmp_path / "gone")


def test_where_it_is_wrong_the_answer_is_often_its_second_choice(loaded: LoadedDraft) -> None:
    long = tuple(range(10, 110))
    model = OracleDraft(loaded, 48, {PROMPT: long}, 0.5)
    cache = model.open(SamplingParams(seed=3), PROMPT)
    window = model.draft(cache, PROMPT, len(long), NEVER, stop=lambda: False)
    wrong = [i for i, token in enumerate(window.tokens) if token != long[i]]
    seconds = sum(int(window.q_ids[i, 1]) == long[i] for i in wrong)
    assert 0.4 < seconds / len(wrong) < 0.8
    found = doubts(window.q_ids, window.q_probs, SamplingParams(), window.start)
    surer = [found[i].margin for i in range(len(long)) if i not in wrong]
    assert sum(surer) / len(surer) > 0.7
    assert sum(found[i].margin for i in wrong) / len(wrong) < 0.4
