"""The simulator: what the device is sent under `masked` could have come from any other prompt of the same length.

Prompt A with the pads r, and prompt B with the pads r + x_A - x_B, where x are the codes that cross, send the same
bytes at every crossing of a whole generation. As r is uniform, so is r + x_A - x_B: who sees the bytes can't tell which
of the two it was. What is left to see is how many rows crossed, and when.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from test_masked import boundary_of, under

from fusedllm.partition import ring
from fusedllm.partition.policies import LEAKS

ROWS = (1, 16, 37)


@dataclass
class Seen:
    """All that crosses in one run, and what the trusted side hid in it."""

    sites: list[object] = field(default_factory=list)
    sent: list[np.ndarray] = field(default_factory=list)
    pads: list[np.ndarray] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)


def prompts(llm, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, llm.config.vocab_size, rows).tolist() for rows in ROWS]


@contextlib.contextmanager
def watched(llm, like: Seen | None = None, broken: str = "") -> Iterator[Seen]:
    """What `llm` sends, with pads of its own; or, `like` another run, with those that make it look like that run.

    `broken` names a site at which the pad is forgotten.
    """
    seen = Seen()
    boundary = boundary_of(llm)
    exchange, encode, decode = boundary.link.exchange, ring.encode, ring.decode

    def encoded(rows, pads=None, **options):
        bare = encode(rows, None, **options)
        if like is not None:
            at = len(seen.pads)
            pads = ring.subtract(ring.add(like.pads[at], like.codes[at].astype(np.int32)), bare.codes.astype(np.int32))
        seen.pads.append(pads.copy())
        seen.codes.append(bare.codes.copy())
        return encode(rows, pads, **options)

    def exchanged(placed, sent):
        if placed.site.name == broken:
            sent = seen.codes[-1].astype(np.int32)
        seen.sites.append(placed.site)
        seen.sent.append(sent.copy())
        return exchange(placed, sent)

    def decoded(received, pads, *operands, **options):
        pads = ring.product(seen.pads[-1], boundary._weights[seen.sites[-1]])
        if seen.sites[-1].name == broken:
            pads = np.zeros_like(pads)
        return decode(received, pads, *operands, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundary.link, "exchange", exchanged)
        patch.setattr(ring, "encode", encoded)
        patch.setattr(ring, "decode", decoded)
        yield seen


@pytest.fixture(scope="module", params=["masked", "masked+verify"])
def llm(request, w8a8):
    # What the prefix cache shows is another test's.
    made = under(w8a8, request.param, prefix_cache=False)
    yield made
    boundary_of(made).close()


def answers(llm, asked, **parameters):
    made = llm.generate(asked, max_tokens=12, ignore_eos=True, **parameters)
    return [answer.token_ids for answer in made]


def test_which_prompts_begin_alike_is_seen_as_declared(w8a8):
    """Of a prompt that begins as an earlier one did fewer rows cross; without the prefix cache as many as ever."""
    for prefix_cache in (True, False):
        shown = under(w8a8, "masked", prefix_cache=prefix_cache)
        prompt = prompts(shown, 1)[2]
        rows = []
        for _ in range(2):
            with watched(shown) as seen:
                answers(shown, [prompt])
            rows.append([len(sent) for sent in seen.sent])
        assert (rows[0] != rows[1]) == prefix_cache
        boundary_of(shown).close()
    assert "which prompts begin alike" in LEAKS


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.9, "seed": 3}])
def test_two_prompts_send_the_same_bytes_at_every_crossing_of_a_generation(llm, parameters):
    one, other = prompts(llm, 1), prompts(llm, 2)
    with watched(llm) as first:
        found = [answers(llm, one, **parameters)]
    with watched(llm, like=first) as second:
        found.append(answers(llm, other, **parameters))
    expected = [answers(llm, asked, **parameters) for asked in (one, other)]
    assert found == expected
    # Another prompt, another answer, other activations at every crossing ...
    assert expected[0] != expected[1]
    assert all((a != b).any() for a, b in zip(first.codes, second.codes, strict=True))
    # ... and nothing of it to be seen.
    assert first.sites == second.sites
    assert len(first.sites) > 12 * (4 * llm.config.num_layers + 1)
    assert [sent.tobytes() for sent in first.sent] == [sent.tobytes() for sent in second.sent]


def test_what_the_device_computes_from_is_what_was_compared(llm, monkeypatch):
    """The bytes that are compared are those that the compiled product is launched with."""
    link = boundary_of(llm).link
    launch, launched = link.launch, []

    def launching(sent, *weights):
        launched.append(np.array(sent))
        assert all({device} == {link.device} for weight in jax.tree.leaves(weights) for device in weight.devices())
        return launch(sent, *weights)

    monkeypatch.setattr(link, "launch", launching)
    with watched(llm) as seen:
        answers(llm, prompts(llm, 1))
    assert [sent.tobytes() for sent in launched] == [sent.tobytes() for sent in seen.sent]


@pytest.mark.parametrize("site", ["qkv", "o", "gate_up", "down", "head"])
def test_a_policy_that_forgets_one_pad_is_told_apart(llm, site):
    """The test can fail: at that site, and at no other, the two runs differ."""
    one, other = ([asked[1]] for asked in (prompts(llm, 1), prompts(llm, 2)))
    with watched(llm, broken=site) as first:
        answers(llm, one)
    with watched(llm, like=first, broken=site) as second:
        answers(llm, other)
    differ = {where.name for where, a, b in zip(first.sites, first.sent, second.sent, strict=True) if (a != b).any()}
    assert differ == {site}


def test_split_and_verify_are_told_apart_at_every_site(w8a8):
    """What they declare: activations in the clear, everywhere."""
    for policy in ("split", "verify"):
        shown = under(w8a8, policy)
        link, views = boundary_of(shown).link, []
        exchange = link.exchange
        for seed in (1, 2):
            seen: list[tuple[str, bytes]] = []

            def exchanged(placed, sent, seen=seen, exchange=exchange):
                seen.append((placed.site.name, np.array(sent).tobytes()))
                return exchange(placed, sent)

            link.exchange = exchanged
            answers(shown, prompts(shown, seed))
            views.append(seen)
        differ = {site for (site, a), (_, b) in zip(*views, strict=True) if a != b}
        assert differ == {"qkv", "o", "gate_up", "down", "head"}
        boundary_of(shown).close()
