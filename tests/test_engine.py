"""The engine on a tiny model: paging, batching, seeds, stops, limits, and what is compiled and copied."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TINY_ENGINE
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import tiny

from fusedllm.config import Sampler, SamplingParams
from fusedllm.engine.compile_guard import forbid_compile
from fusedllm.engine.config import LAUNCH_TOKENS, EngineConfig, split_into_chunks
from fusedllm.engine.pages import PagePool
from fusedllm.errors import CompileForbiddenError, ContextLengthError, RequestError, TokenizerError
from fusedllm.llm import LLM, load
from fusedllm.weights.random import random_params

# Logits of a two-layer float32 model whose products sum 48 to 80 terms, in a range of about 10.
TOLERANCE = 1e-4


def ids(length, seed=0):
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, length).tolist()


@pytest.mark.parametrize("chunk", [1, 7, 16, 24])
def test_chunked_prefill_equals_one_prefill(tiny_llm, chunk):
    prompt = ids(61)
    whole = tiny_llm.logits(prompt, chunk=64)
    np.testing.assert_allclose(tiny_llm.logits(prompt, chunk=chunk), whole, atol=TOLERANCE)
    np.testing.assert_allclose(tiny_llm.logits(prompt), whole, atol=TOLERANCE)


def test_prefill_then_decode_equals_one_prefill(tiny_llm):
    prompt = ids(37)
    (answer,) = tiny_llm.generate([prompt], max_tokens=30, ignore_eos=True)
    rows = tiny_llm.logits(prompt + list(answer.token_ids))
    greedy = rows.argmax(axis=-1)[len(prompt) - 1 : -1]
    assert list(answer.token_ids) == greedy.tolist()


def test_a_request_alone_equals_itself_in_a_batch(tiny_llm):
    prompts = [ids(length, seed=length) for length in (1, 15, 16, 17, 33, 40, 5)]
    parameters = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 20, "ignore_eos": True, "seed": 11}
    together = tiny_llm.generate(prompts, **parameters)
    for index, prompt in enumerate(prompts):
        # Of the same bucket: seven requests decode in eight slots, and so do these.
        others = [ids(9, seed=100 + index)] * 6
        again = tiny_llm.generate([*others[:index], prompt, *others[index:]], **parameters)[index]
        assert again.token_ids == together[index].token_ids


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(tiny_llm):
    def draw(seed):
        return tiny_llm.generate([ids(8)], temperature=1.0, max_tokens=24, ignore_eos=True, seed=seed)[0].token_ids

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_more_requests_than_slots_and_pages_all_get_their_answers(tiny_llm):
    prompts = [ids(3 + index, seed=index) for index in range(21)]
    answers = tiny_llm.generate(prompts, max_tokens=40, ignore_eos=True)
    assert [answer.usage.completion_tokens for answer in answers] == [40] * 21
    assert tiny_llm.engine.pages_in_use == 0
    for prompt, answer in list(zip(prompts, answers, strict=True))[::5]:
        greedy = tiny_llm.logits(prompt + list(answer.token_ids)).argmax(axis=-1)[len(prompt) - 1 : -1]
        assert list(answer.token_ids) == greedy.tolist()


def test_an_answer_ends_at_a_stop_token_and_says_so(tiny_llm):
    (free,) = tiny_llm.generate([ids(8)], max_tokens=20, ignore_eos=True, temperature=1.0, seed=3)
    stop = free.token_ids[6]
    first = free.token_ids.index(stop)
    (stopped,) = tiny_llm.generate(
        [ids(8)], max_tokens=20, ignore_eos=True, temperature=1.0, seed=3, stop_token_ids=[stop]
    )
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"


def test_the_models_own_end_token_ends_an_answer_unless_ignored(tiny_llm):
    bias = {2: 100.0}
    (ended,) = tiny_llm.generate([ids(8)], max_tokens=5, logit_bias=bias)
    (ignored,) = tiny_llm.generate([ids(8)], max_tokens=5, logit_bias=bias, ignore_eos=True)
    assert (ended.token_ids, ended.finish_reason) == ((2,), "stop")
    assert (ignored.token_ids, ignored.finish_reason) == ((2,) * 5, "length")


def test_logprobs_are_of_the_models_own_distribution(tiny_llm):
    prompt = ids(12)
    (answer,) = tiny_llm.generate(
        [prompt], max_tokens=9, ignore_eos=True, logprobs=3, temperature=0.7, seed=1, frequency_penalty=0.5
    )
    rows = tiny_llm.logits(prompt + list(answer.token_ids))[len(prompt) - 1 : -1].astype(np.float64)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    assert len(answer.logprobs) == 9
    for row, token, entry in zip(rows, answer.token_ids, answer.logprobs, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=TOLERANCE)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:3].tolist()
    (plain,) = tiny_llm.generate([prompt], max_tokens=3)
    assert plain.logprobs == ()


def test_penalties_count_the_prompt_and_the_output(tiny_llm):
    prompt = ids(12)
    (free,) = tiny_llm.generate([prompt], max_tokens=40, ignore_eos=True)
    (penalized,) = tiny_llm.generate([prompt], max_tokens=40, ignore_eos=True, frequency_penalty=100.0)
    assert len(set(penalized.token_ids)) == 40 > len(set(free.token_ids))
    (fresh,) = tiny_llm.generate([prompt], max_tokens=20, ignore_eos=True, repetition_penalty=100.0)
    assert not set(fresh.token_ids) & set(prompt)


def test_a_launch_is_as_wide_as_the_requests_that_run(tiny_llm, monkeypatch):
    widths = []
    decode = tiny_llm.engine.runner.decode
    monkeypatch.setattr(
        tiny_llm.engine.runner, "decode", lambda orders, *rest: widths.append(len(orders)) or decode(orders, *rest)
    )
    for requests, width in ((1, 1), (3, 4), (8, 8), (1, 1), (2, 2)):
        widths.clear()
        tiny_llm.generate([ids(5)] * requests, max_tokens=9, ignore_eos=True)
        assert max(widths) == width
    widths.clear()
    # Nobody is done before the last one decodes, however few prompt tokens go between two steps.
    lengths = [20] * 7 + [60]
    sequences = [tiny_llm.prepare(ids(5), SamplingParams(max_tokens=n, ignore_eos=True)).sequence for n in lengths]
    assert sum(len(chunk.tokens) for _, chunk in tiny_llm.engine.run(sequences)) == sum(lengths)
    assert (max(widths), widths[-1]) == (8, 1)


def test_a_request_that_its_caller_ends_lets_the_others_go_on(tiny_llm):
    sequences = [tiny_llm.stream(ids(5, seed), max_tokens=40, ignore_eos=True).sequence for seed in range(3)]
    counts = [0, 0, 0]
    for index, chunk in tiny_llm.engine.run(sequences):
        counts[index] += len(chunk.tokens)
        if index == 1:
            # As a stop string does.
            sequences[1].finish_reason = "stop"
            tiny_llm.engine.cancel(sequences[1])
    assert counts[0] == counts[2] == 40 > counts[1] > 0
    assert tiny_llm.engine.pages_in_use == 0


def test_warming_up_is_refused_while_requests_run(tiny_llm):
    stream = tiny_llm.stream(ids(5), max_tokens=30, ignore_eos=True)
    next(stream)
    with pytest.raises(RequestError, match="requests are running"):
        tiny_llm.warm_up()
    list(stream)
    assert len(stream.token_ids) == 30


def test_what_an_earlier_request_left_in_a_page_reaches_no_later_one(tiny_llm):
    prompt = ids(21)
    expected = tiny_llm.logits(prompt)
    runner = tiny_llm.engine.runner
    tiny_llm.engine._scheduler.pages.forget()
    runner._cache = jax.tree.map(lambda pages: pages * np.nan, runner._cache)
    np.testing.assert_array_equal(tiny_llm.logits(prompt), expected)
    (answer,) = tiny_llm.generate([prompt], max_tokens=9, ignore_eos=True)
    tiny_llm.engine._scheduler.pages.forget()
    runner._cache = runner._make_cache()
    (again,) = tiny_llm.generate([prompt], max_tokens=9, ignore_eos=True)
    assert answer.token_ids == again.token_ids


def test_streams_can_be_interleaved_and_closed(tiny_llm):
    first = tiny_llm.stream(ids(5, 1), max_tokens=50, ignore_eos=True)
    run = tiny_llm.engine.run([first.sequence])
    index, chunk = next(run)
    assert index == 0
    (other,) = tiny_llm.generate([ids(5, 2)], max_tokens=8, ignore_eos=True)
    assert other.usage.completion_tokens == 8
    tokens = list(chunk.tokens) + [token for _, chunk in run for token in chunk.tokens]
    assert len(tokens) == 50

    abandoned = tiny_llm.engine.run([tiny_llm.stream(ids(5, 3), max_tokens=90, ignore_eos=True).sequence])
    next(abandoned)
    assert tiny_llm.engine.pages_in_use > 0
    abandoned.close()
    assert tiny_llm.engine.pages_in_use == 0
    (after,) = tiny_llm.generate([ids(5, 2)], max_tokens=8, ignore_eos=True)
    assert after.token_ids == other.token_ids


def interrupted_after_donation(runner):
    """A program that Ctrl-C stops when it has taken the cache and not yet given it back."""

    def program(*arguments):
        for array in jax.tree.leaves(runner._cache):
            array.delete()
        raise KeyboardInterrupt

    return program


def test_a_failed_launch_ends_its_requests_and_nothing_else(tiny_llm, monkeypatch):
    (before,) = tiny_llm.generate([ids(5)], max_tokens=8, ignore_eos=True)
    runner = tiny_llm.engine.runner

    with monkeypatch.context() as patch:
        patch.setitem(runner._decode, Sampler.FULL, interrupted_after_donation(runner))
        with pytest.raises(KeyboardInterrupt):
            tiny_llm.generate([ids(5)], max_tokens=8)
    assert tiny_llm.engine.pages_in_use == 0
    (after,) = tiny_llm.generate([ids(5)], max_tokens=8, ignore_eos=True)
    assert after.token_ids == before.token_ids


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(tiny_llm):
    with pytest.raises(ContextLengthError, match=r"128 tokens, the context holds 128 .*model allows 256"):
        tiny_llm.generate([ids(128)])
    with pytest.raises(ContextLengthError, match=r"129 tokens .* holds 128"):
        tiny_llm.logits(ids(129))
    (last,) = tiny_llm.generate([ids(127)], max_tokens=9)
    assert last.usage.completion_tokens == 1


@pytest.mark.parametrize("prompt", [[], [TINY.vocab_size], [-1], [1.5], [True, 3], None, {}, b"abc", [None]])
def test_a_prompt_that_is_no_list_of_ids_is_refused(tiny_llm, prompt):
    for call in (tiny_llm.stream, tiny_llm.logits, lambda prompt: tiny_llm.generate([prompt])):
        with pytest.raises(RequestError, match=r"prompt is empty|token ids must be"):
            call(prompt)


@pytest.mark.parametrize("prompts", [5, None, {"a": 1}, b"abc"])
def test_prompts_that_are_no_list_are_refused(tiny_llm, prompts):
    with pytest.raises(RequestError, match="a prompt must be a text, a list of token ids"):
        tiny_llm.generate(prompts)


@pytest.mark.parametrize("parameter", [{"logit_bias": {199: 1.0}}, {"stop_token_ids": [199]}])
def test_a_parameter_that_names_a_token_outside_the_vocabulary_is_refused(tiny_llm, parameter):
    with pytest.raises(RequestError, match="names token 199, the vocabulary has 199"):
        tiny_llm.generate([[1]], **parameter)


def test_an_interrupted_evaluation_breaks_nothing(tiny_llm, monkeypatch):
    expected = tiny_llm.logits(ids(9))
    runner = tiny_llm.engine.runner

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_logits", interrupted_after_donation(runner))
        with pytest.raises(KeyboardInterrupt):
            tiny_llm.logits(ids(9))
    np.testing.assert_array_equal(tiny_llm.logits(ids(9)), expected)


def test_a_cache_that_does_not_fit_is_refused_with_what_to_do():
    huge = dataclasses.replace(TINY_ENGINE, cache_tokens=2**40)
    with pytest.raises(RequestError, match="does not fit into memory; ask for less"):
        LLM(TINY, random_params(TINY, "float32", seed=1), engine=huge)


def test_text_without_a_tokenizer_is_refused(tiny_llm):
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tiny_llm.generate("hello")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tiny_llm.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(TokenizerError, match="stop strings need a tokenizer"):
        tiny_llm.generate([[1, 2]], stop=["x"])


def test_perplexity_is_that_of_the_logits(tiny_llm):
    tokens = ids(70)
    total, count = 0.0, 0
    for first in range(0, 70, 32):
        window = tokens[first : first + 32]
        rows = tiny_llm.logits(window).astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        total -= sum(rows[at, token] for at, token in enumerate(window[1:]))
        count += len(window) - 1
    assert tiny_llm.perplexity(tokens, window=32) == pytest.approx(np.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("source", ["unbound arrays", "a file"])
def test_nothing_compiles_after_warm_up(tmp_path, source):
    # Programs tell arrays that are bound to a device, as a loader's are, from arrays that are not.
    if source == "a file":
        llm = load(tiny.write("llama3", tmp_path / "model"), engine=TINY_ENGINE)
    else:
        unbound = jax.tree.map(lambda weights: jnp.array(np.asarray(weights)), random_params(TINY, "float32", seed=1))
        assert not unbound.final_norm.committed
        llm = LLM(TINY, unbound, engine=TINY_ENGINE)
    rng = np.random.default_rng(9)
    llm.warm_up()
    with forbid_compile():
        for _ in range(50):
            lengths = rng.integers(1, 100, rng.integers(1, 10))
            prompts = [rng.integers(3, llm.config.vocab_size, length).tolist() for length in lengths]
            penalty, temperature = float(rng.integers(1, 3)), float(rng.integers(0, 2))
            llm.generate(
                prompts, max_tokens=int(rng.integers(1, 12)), temperature=temperature, repetition_penalty=penalty,
                top_p=0.9, logprobs=2,
            )  # fmt: skip


def test_a_compilation_after_warm_up_is_an_error_with_its_shape(tiny_llm):
    with forbid_compile(), pytest.raises(CompileForbiddenError, match="logits of 5 tokens would compile"):
        tiny_llm.logits(ids(9), chunk=5)
    with forbid_compile(), pytest.raises(CompileForbiddenError, match="after warm-up"):
        jax.jit(lambda x: x * 3 + 1)(np.ones(3))
    tiny_llm.logits(ids(9), chunk=5)


def test_decoding_does_not_convert_the_whole_embedding():
    config = dataclasses.replace(TINY, vocab_size=20_000, tie_embeddings=False)
    llm = LLM(config, random_params(config, "bfloat16", seed=1), engine=TINY_ENGINE)
    table = llm.engine.runner._params.embedding
    assert table.dtype == jnp.bfloat16
    # As float32 it would be twice as large.
    assert llm.engine.runner.memory_analysis(1).temp_size_in_bytes < table.nbytes


@pytest.mark.parametrize(
    ("batch", "kv_dtype", "implementation"),
    [(1, "float32", None), (4, "float32", None), (1, "int8", "xla"), (1, "float8_e4m3fn", "xla")],
)
def test_the_cache_is_updated_in_place(batch, kv_dtype, implementation):
    # So large that a copy of one layer's keys would be more than all other temporaries.
    engine = dataclasses.replace(TINY_ENGINE, cache_tokens=2**17)
    params = random_params(TINY, "float32", seed=1)
    llm = LLM(TINY, params, engine=engine, kv_dtype=kv_dtype, implementation=implementation)
    runner = llm.engine.runner
    analysis = runner.memory_analysis(batch)
    assert analysis.alias_size_in_bytes >= runner.cache_bytes
    assert analysis.temp_size_in_bytes < runner.cache_bytes / (2 * TINY.num_layers)


def test_only_ids_come_back_unless_more_is_asked_for(tiny_llm):
    traffic = tiny_llm.engine.runner.traffic
    before = dataclasses.replace(traffic)
    tiny_llm.generate([ids(8)] * 4, max_tokens=33, ignore_eos=True)
    tokens = traffic.tokens - before.tokens
    assert tokens == 4 * 33
    # An id is four bytes; the slots of a last block that is not full come along.
    assert (traffic.bytes_to_host - before.bytes_to_host) / tokens <= 8


@settings(max_examples=300)
@given(length=st.integers(1, 3000), buckets=st.sampled_from([(16,), (16, 64, 128, 256, 512), (32, 128), (16, 2048)]))
def test_chunks_cover_the_prompt_and_only_the_last_is_padded(length, buckets):
    chunks = split_into_chunks(length, buckets)
    assert sum(size for size, _ in chunks) == length
    assert all(size == bucket for size, bucket in chunks[:-1])
    assert all(bucket in buckets and size <= bucket for size, bucket in chunks)
    cost = sum(bucket + LAUNCH_TOKENS for _, bucket in chunks)
    assert cost <= (length // buckets[-1] + 1) * (buckets[-1] + LAUNCH_TOKENS)


@given(st.lists(st.integers(0, 6), max_size=30), st.randoms(use_true_random=False))
def test_no_page_is_lost_or_handed_out_twice(sizes, random):
    pool, held = PagePool(20), []
    for size in sizes:
        if size <= pool.free:
            held.append(pool.take(size))
        else:
            with pytest.raises(RequestError):
                pool.take(size)
        if held and random.random() < 0.5:
            pool.give_back(held.pop(random.randrange(len(held))))
        pages = [page for group in held for page in group]
        assert len(set(pages)) == len(pages) == pool.in_use == 19 - pool.free
        assert 0 not in pages


def test_a_page_that_nobody_holds_can_not_be_given_back():
    pool = PagePool(4)
    pages = pool.take(2)
    pool.give_back(pages)
    with pytest.raises(RequestError):
        pool.give_back(pages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_context": 0}, "max_context"),
        ({"prefill_buckets": (10,)}, "multiples of page_size"),
        ({"prefill_buckets": (32, 16)}, "ascending"),
        ({"batch_buckets": ()}, "ascending"),
        ({"cache_tokens": 5}, "at least one request"),
        ({"decode_steps": 1.5}, "decode_steps must be an integer"),
        ({"latency_seconds": -1}, "latency_seconds"),
        ({"decode_steps": 16, "free_steps": 3}, r"free_steps must be 0 or divide decode_steps \(16\), got 3"),
        ({"free_steps": -1}, "free_steps"),
    ],
)
def test_sizes_that_contradict_one_another_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        EngineConfig(**values)


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(RequestError, match=r"300 was asked for, the model allows 256"):
        LLM(TINY, None, engine=dataclasses.replace(TINY_ENGINE, max_context=300, cache_tokens=600))
