"""Every family says what HF transformers says, at every position, however the tokens are fed."""

from dataclasses import dataclass

import numpy as np
import pytest
from reference import make_parity, tiny

import fusedllm

# Of the logits' range. Two float32 implementations that sum in different orders differ by about 1e-6 of it here; a
# misread feature changes it by 1e-2 and more (`test_the_references_would_notice_a_misread_feature`).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    name: str
    llm: fusedllm.LLM
    ids: np.ndarray
    logits: np.ndarray

    def error(self, logits: np.ndarray) -> float:
        """The largest difference from the stored logits at any position, in units of their range."""
        assert logits.shape == self.logits.shape
        assert logits.dtype == np.float32
        return float(np.abs(logits - self.logits).max() / np.ptp(self.logits))


@pytest.fixture(scope="module", params=list(tiny.CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = tiny.write(request.param, tmp_path_factory.mktemp(request.param))
    llm = fusedllm.load(str(path), dtype="float32", max_context=128)
    with np.load(make_parity.STORED / f"{request.param}.npz") as stored:
        return Case(request.param, llm, stored["ids"], stored["logits"])


def test_one_prefill_gives_the_reference_logits_at_every_position(case: Case) -> None:
    assert case.error(case.llm.logits(case.ids.tolist())) <= TOLERANCE


# 1 is token by token; the others divide neither the 96 tokens nor the window of 24, and 64 ends at the prompt.
@pytest.mark.parametrize("chunk", [1, 7, 25, 64])
def test_prefill_in_chunks_gives_the_reference_logits_at_every_position(case: Case, chunk: int) -> None:
    assert case.error(case.llm.logits(case.ids.tolist(), chunk=chunk)) <= TOLERANCE


def test_greedy_decoding_after_a_prefill_says_what_the_reference_says(case: Case) -> None:
    prompt, said = np.split(case.ids, [tiny.PROMPT_TOKENS])
    (result,) = case.llm.generate([prompt.tolist()], max_tokens=len(said), ignore_eos=True)
    assert list(result.token_ids) == said.tolist()
    assert result.finish_reason == "length"


@pytest.mark.parametrize("name", tiny.CASES)
def test_stored_logits_belong_to_the_weights_that_the_tests_write(name: str) -> None:
    with np.load(make_parity.STORED / f"{name}.npz") as stored:
        assert str(stored["digest"]) == tiny.digest(name)


def test_stored_references_are_the_cases_and_small() -> None:
    files = list(make_parity.STORED.iterdir())
    assert {path.stem for path in files} == set(tiny.CASES)
    # All stored references together shall stay under a megabyte; these are the largest part.
    assert sum(path.stat().st_size for path in files) < 500_000


@pytest.mark.reference
def test_transformers_now_agrees_with_the_stored_logits_and_with_ours(case: Case) -> None:
    live = make_parity.logits(make_parity.model(case.name), case.ids)
    # The same library with other kernels: rounding only.
    assert case.error(live) <= TOLERANCE / 10
    ours = case.llm.logits(case.ids.tolist())
    assert np.abs(ours - live).max() <= TOLERANCE * np.ptp(live)


@pytest.mark.reference
@pytest.mark.parametrize("name", tiny.WITHOUT)
def test_the_references_would_notice_a_misread_feature(name: str) -> None:
    with np.load(make_parity.STORED / f"{name}.npz") as stored:
        misread = make_parity.logits(make_parity.model(name, **tiny.WITHOUT[name]), stored["ids"])
        assert np.abs(misread - stored["logits"]).max() > 100 * TOLERANCE * np.ptp(stored["logits"])
