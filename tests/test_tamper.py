"""A device that answers wrongly, at every site of a running model: what was asked ends, and no wrong answer passes."""

from __future__ import annotations

import numpy as np
import pytest
from test_masked import boundary_of, under

from fusedllm.errors import IntegrityError
from fusedllm.partition import ring

SITES = ("qkv", "o", "gate_up", "down", "head")
# Of a step of three requests, in the bucket that takes them.
ROWS = 4
# Of each way to tamper, at each site: 5 sites, 6 ways, 135,000 in all, of which some change nothing.
TRIALS = 4_500


def flip_a_bit(received, rng, **_):
    received.view(np.uint32)[tuple(rng.integers(received.shape))] ^= np.uint32(1) << np.uint32(rng.integers(32))


def add_half_the_ring(received, rng, **_):
    # Which is to flip the highest bit.
    received.view(np.uint32)[tuple(rng.integers(received.shape))] ^= np.uint32(2**31)


def swap_rows(received, rng, **_):
    received[[0, -1]] = received[[-1, 0]]


def zeros(received, rng, **_):
    received[rng.integers(len(received))] = 0


def replay(received, rng, *, before, **_):
    received[...] = before


def another_site(received, rng, *, elsewhere, **_):
    received[...] = elsewhere


WAYS = (flip_a_bit, add_half_the_ring, swap_rows, zeros, replay, another_site)


@pytest.fixture(scope="module", params=["verify", "masked+verify"])
def llm(request, w8a8):
    made = under(w8a8, request.param)
    yield made
    boundary_of(made).close()


def prompts(llm):
    rng = np.random.default_rng(4)
    return [rng.integers(3, llm.config.vocab_size, 7).tolist() for _ in range(3)]


def answers(llm):
    return [answer.token_ids for answer in llm.generate(prompts(llm), max_tokens=5, ignore_eos=True)]


class Tampering:
    """A device that answers the last few crossings of one site wrongly, until one answer has really changed."""

    def __init__(self, link, site, way, rng):
        self.link, self.site, self.way, self.rng = link, site, way, rng
        self.honest = link.exchange
        self.last: dict[tuple[object, tuple[int, ...]], np.ndarray] = {}
        self.changed = 0

    def __call__(self, placed, sent):
        (received,) = self.honest(placed, sent)
        before = self.last.get((placed.site, received.shape))
        self.last[placed.site, received.shape] = received
        # Steps of several rows, so that there is another row and an earlier answer.
        if placed.site.name != self.site or self.changed or before is None or len(received) < ROWS:
            return (received,)
        (elsewhere,) = self.honest(self._another(placed), sent)
        tampered = received.copy()
        self.way(tampered, self.rng, before=before, elsewhere=elsewhere)
        self.changed = int((tampered != received).sum())
        return (tampered,)

    def _another(self, placed):
        """The same product of another layer, or, of the vocabulary, with other rows of it."""
        if placed.site.layer is None:
            (weight,) = placed.weights
            return type(placed)(placed.site, (np.roll(np.asarray(weight), 1, axis=0),))
        return next(
            other
            for other in self.link._sites
            if other.site.name == placed.site.name and other.site.layer != placed.site.layer
        )


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_wrong_answer_ends_the_requests_and_the_next_are_answered(llm, monkeypatch, site, way):
    expected = answers(llm)
    tampering = Tampering(boundary_of(llm).link, site, way, np.random.default_rng(1))
    with monkeypatch.context() as patch:
        patch.setattr(boundary_of(llm).link, "exchange", tampering)
        with pytest.raises(IntegrityError, match=f"{site}.*(not the one|larger than|wrong)"):
            answers(llm)
    assert tampering.changed
    assert answers(llm) == expected


def test_of_a_hundred_thousand_wrong_products_of_a_model_none_passes_and_all_honest_ones_do(llm, monkeypatch):
    """With the model's own weights, activations and pads, at each site."""
    boundary = boundary_of(llm)
    rng = np.random.default_rng(7)
    check, seen = boundary._check, {}

    def recording(group, codes, decoded):
        if len(codes) == ROWS:
            seen.setdefault(group.site, []).append((codes.copy(), decoded.sums.copy()))
        check(group, codes, decoded)

    monkeypatch.setattr(boundary, "_check", recording)
    answers(llm)
    trials = 0
    for name in SITES:
        site = next(site for site in seen if site.name == name)
        codes, sums = (np.stack(parts) for parts in zip(*seen[site], strict=True))
        assert passes(boundary.verifier, site, codes, sums).all()
        for way in WAYS:
            # Of the same answers, but with other secrets.
            boundary.verifier.rotate()
            which = rng.integers(len(codes), size=TRIALS)
            asked, wrong = codes[which], sums[which].copy()
            for trial, answer in enumerate(wrong):
                other = sums[(which[trial] + 1) % len(sums)]
                way(answer, rng, before=other, elsewhere=np.roll(other, 1, axis=1))
            changed = (wrong != sums[which]).any((1, 2))
            assert changed.mean() > 0.5
            np.testing.assert_array_equal(passes(boundary.verifier, site, asked, wrong), ~changed)
            assert passes(boundary.verifier, site, asked, sums[which]).all()
            trials += int(changed.sum())
    assert trials >= 100_000


def passes(verifier, site, codes, sums):
    """Whether each trial passes, by the arithmetic of `check` over all of them at once."""
    secret = verifier._secrets[site]
    count, rows, _ = codes.shape
    left = verifier._residues(sums.reshape(count * rows, -1), secret.outputs)
    right = verifier._residues(codes.reshape(count * rows, -1), secret.inputs)
    inside = np.array([ring.in_range(one, verifier.bound(site)) for one in sums])
    return inside & (left == right).reshape(count, -1).all(1)
