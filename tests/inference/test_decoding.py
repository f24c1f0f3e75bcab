"""Decoding against plain full forward passes and NumPy, and what it refuses."""

import dataclasses
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import random_prompts, toy_adapter, toy_model
from toy_tokenizer import VOCAB_SIZE, toy_tokenizer

import jaxpeft as jp
from jaxpeft.core.backend import traced_for
from jaxpeft.core.errors import UserError
from jaxpeft.data.encode import encode_rows
from jaxpeft.inference import decoding
from jaxpeft.inference.decoding import encode_prompts, generate, generate_ids
from jaxpeft.inference.sampling import Sampling, filter_logits
from jaxpeft.methods.binding import bind
from jaxpeft.models import unstack
from jaxpeft.models.cache import init_cache

VARIANTS = {
    "llama": {},
    "tied mistral with windows": {"windows": (4, 4), "tie_embeddings": True},
    "qwen with one window": {"windows": (0, 3), "qkv_bias": True, "qk_norm": True},
}
METHODS = [
    jp.LoRA(rank=2, dora=True),
    jp.VeRA(rank=4),
    jp.PrefixTuning(num_tokens=3),
]
LENGTHS = [5, 33, 1, 17, 8]


def greedy_without_cache(base, prompt, count, adapter=None, width=96):
    """One full forward pass over everything so far for every new token."""
    ids = list(prompt)
    for _ in range(count):
        row = np.array([ids + [0] * (width - len(ids))])  # what follows is not seen
        logits = base(row, adapter=adapter)
        ids.append(int(np.argmax(np.asarray(logits)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.fixture
def count_traces(monkeypatch):
    """A list that grows by one for every time that decoding is traced."""
    traced, original = [], decoding.init_cache
    monkeypatch.setattr(decoding, "init_cache", lambda *a: traced.append(1) or original(*a))
    return traced


@pytest.mark.parametrize(
    ("variant", "adapted"),
    [
        ("llama", False),
        ("llama", True),
        ("tied mistral with windows", True),
        ("qwen with one window", False),
    ],
)
@pytest.mark.parametrize("long", [False, True], ids=["stacked", "layer by layer"])
def test_cached_greedy_equals_uncached_greedy_token_for_token(
    getkey, monkeypatch, variant, adapted, long
):
    monkeypatch.setattr(decoding, "LONG", 1 if long else 1000)
    base = toy_model(getkey(), tokenizer=False, **VARIANTS[variant])
    adapter = toy_adapter(getkey(), base) if adapted else None
    prompts = random_prompts(LENGTHS)
    expected = [greedy_without_cache(base, prompt, 20, adapter) for prompt in prompts]
    assert generate_ids(base, prompts, adapter=adapter, max_new_tokens=20) == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_method_decodes_the_same_layer_by_layer(getkey, monkeypatch, method):
    base = toy_model(getkey(), tokenizer=False)
    adapter = jp.init_adapter(method, base, getkey())
    leaves, treedef = jax.tree.flatten(adapter.params)
    noise = [leaf + 0.1 * jax.random.normal(getkey(), leaf.shape) for leaf in leaves]
    adapter = adapter.replace(params=jax.tree.unflatten(treedef, noise))
    answers = []
    for long in (1, 1000):
        monkeypatch.setattr(decoding, "LONG", long)
        prompts = random_prompts(LENGTHS)
        answers.append(generate_ids(base, prompts, adapter=adapter, max_new_tokens=12))
    assert answers[0] == answers[1]


def test_layers_one_by_one_lie_in_the_memory_of_the_stack(getkey):
    base = toy_model(getkey(), d_model=64, d_ff=64, tokenizer=False)
    leaves = jax.tree.leaves(base.params["layers"])
    layers = unstack.views(base.params)
    assert layers is not None
    for leaf, parts in zip(leaves, layers, strict=True):
        assert len(parts) == len(leaf)
        size = leaf[0].nbytes
        for index, part in enumerate(parts):
            np.testing.assert_array_equal(part, leaf[index])
            place = part.unsafe_buffer_pointer() - leaf.unsafe_buffer_pointer()
            assert leaf.unsafe_buffer_pointer() % 64 == size % 64 == 0  # else it would be copied
            assert place == index * size
    with traced_for("cuda"):
        assert unstack.views(base.params) is None


def test_the_answer_is_the_given_adapters(getkey):
    base = toy_model(getkey(), tokenizer=False)
    prompts = random_prompts(LENGTHS)
    one, other = toy_adapter(getkey(), base), toy_adapter(getkey(), base)
    answers = [
        generate_ids(base, prompts, adapter=adapter, max_new_tokens=8)
        for adapter in (None, one, other, one)
    ]
    assert answers[1] == answers[3]
    assert all(a != b for a, b in itertools.combinations(answers[:3], 2))


def test_answers_stop_before_the_first_id_that_ends_a_turn(getkey):
    free = toy_model(getkey(), tokenizer=False)
    prompts = random_prompts([3, 7, 12, 2, 30])
    whole = [greedy_without_cache(free, prompt, 24) for prompt in prompts]
    stops = (whole[0][3], whole[1][9])
    base = free.replace(config=dataclasses.replace(free.config, eos_token_ids=stops))
    expected = [
        list(itertools.takewhile(lambda token: token not in stops, answer)) for answer in whole
    ]
    assert len({len(answer) for answer in expected}) > 1
    assert generate_ids(base, prompts, max_new_tokens=24) == expected


def test_the_tokenizers_eos_ends_a_turn_too(getkey):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(), eos_token_ids=(7,))
    assert decoding.stop_ids(base) == (7, 1)


def test_padding_on_the_left_does_not_change_logits(getkey):
    base = toy_model(getkey(), tokenizer=False, **VARIANTS["qwen with one window"])
    (prompt,) = random_prompts([6])
    alone = base(np.array([prompt + [0] * 90]))[0, 5]

    @jax.jit
    def run(tokens, segments):
        return base.module.apply(
            bind(base.params),
            tokens,
            segment_ids=segments,
            positions=jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0),
            cache=init_cache(base.config, 1, 40, jnp.float32),
        )[0]

    padded = run(jnp.array([[9] * 26 + prompt]), jnp.array([[0] * 26 + [1] * 6]))
    np.testing.assert_allclose(padded[0, -1], alone, rtol=1e-5, atol=1e-5)


def test_neighbours_in_the_batch_do_not_change_an_answer(getkey):
    base = toy_model(getkey(), tokenizer=False)
    prompts = random_prompts(LENGTHS)
    together = generate_ids(base, prompts, max_new_tokens=10)
    for place in (0, 2, 3):
        assert generate_ids(base, [prompts[place]], max_new_tokens=10) == [together[place]]


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33])
def test_answers_have_max_new_tokens_unless_they_end(getkey, count):
    base = toy_model(getkey(), tokenizer=False)
    answers = generate_ids(base, random_prompts(LENGTHS), max_new_tokens=count)
    assert [len(answer) for answer in answers] == [count] * 5


class CountingModule:
    """A module that counts how often it runs."""

    def __init__(self, module):
        self.module, self.runs, self.compute_dtype = module, 0, module.compute_dtype

    def apply(self, *args, **options):
        jax.debug.callback(self.count)
        return self.module.apply(*args, **options)

    def count(self):
        self.runs += 1


def test_every_forward_pass_gives_a_token(getkey):
    free = toy_model(getkey(), tokenizer=False)
    answer = greedy_without_cache(free, [5, 6], 12)
    module = CountingModule(free.module)
    stops = dataclasses.replace(free.config, eos_token_ids=(answer[-1],))
    base = free.replace(module=module, config=stops)
    for limit in (1, 3, 24):
        module.runs = 0
        (ids,) = generate_ids(base, [[5, 6]], max_new_tokens=limit)
        jax.effects_barrier()
        ended = len(ids) < limit
        assert module.runs == len(ids) + ended
    assert ended


def test_one_compile_serves_a_bucket_of_lengths_and_every_adapter(getkey, count_traces):
    base = toy_model(getkey(), tokenizer=False, d_ff=20)
    for length, new, alpha, dropout in ((3, 5, 4.0, 0.0), (31, 32, 1.0, 0.5), (32, 1, 9.0, 0.1)):
        adapter = toy_adapter(getkey(), base, alpha=alpha, dropout=dropout)
        generate_ids(base, random_prompts([length] * 2), adapter=adapter, max_new_tokens=new)
    assert len(count_traces) == 1
    generate_ids(base, random_prompts([33] * 2), adapter=adapter, max_new_tokens=5)
    assert len(count_traces) == 2


def test_decoding_is_traced_at_most_once_a_bucket(getkey, monkeypatch):
    base = toy_model(getkey(), tokenizer=False, d_ff=36)
    chex.clear_trace_counter()
    monkeypatch.setattr(decoding, "bind", chex.assert_max_traces(bind, n=1))
    for length in (3, 32):
        generate_ids(base, random_prompts([length] * 2), max_new_tokens=length)
    with pytest.raises(AssertionError, match="traced"):  # the check can fail
        generate_ids(base, random_prompts([33] * 2), max_new_tokens=3)


def test_one_compile_serves_all_ways_to_sample(getkey, count_traces):
    base = toy_model(getkey(), tokenizer=False, d_ff=28)
    for temperature, top_k, top_p in ((0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 10**12, 0.4)):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        generate_ids(base, [[4, 5]], sampling=sampling, key=getkey(), max_new_tokens=4)
    assert len(count_traces) == 1


def numpy_filter(logits, top_k, top_p):
    """Row by row in float64: the k largest, then the shortest prefix of them that reaches p."""
    out = np.full(logits.shape, -np.inf, np.float32)
    for row, kept in zip(logits, out, strict=True):
        order = np.argsort(-row.astype(np.float64), kind="stable")
        order = order[:top_k] if top_k else order
        mass = np.exp(row[order].astype(np.float64) - row.max())
        if top_p < 1:
            reached = np.cumsum(mass) / mass.sum()
            order = order[: 1 + int(np.sum(reached < top_p))]
        kept[order] = row[order]
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 14),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    spread=st.floats(0.1, 8),
)
def test_filter_logits_matches_numpy(seed, top_k, top_p, spread):
    # Whole steps apart by at least 0.01, so that rounding cannot move the border of the nucleus.
    rng = np.random.default_rng(seed)
    logits = np.stack([rng.permutation(12) for _ in range(3)]) * spread
    logits = (logits + rng.uniform(0, 0.01)).astype(np.float32)
    actual = filter_logits(jnp.array(logits), jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(actual, numpy_filter(logits, top_k, np.float32(top_p)))


def test_filter_logits_keeps_ties_and_never_empties_a_row():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    kept = filter_logits(logits, jnp.int32(1), jnp.float32(1e-6))
    np.testing.assert_array_equal(kept[0], [-np.inf, 3.0, 3.0, -np.inf])
    np.testing.assert_array_equal(kept[1], logits[1])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (2.5, 6, 1.0), (1.5, 0, 0.8), (3.0, 8, 0.7)]
)
def test_tokens_are_drawn_with_the_probabilities_of_the_law(getkey, temperature, top_k, top_p):
    draws = 2048
    base = toy_model(getkey(), tokenizer=False)
    logits = np.asarray(base(np.array([[3, 1, 4]])))[0, -1].astype(np.float64) / temperature
    kept = numpy_filter(logits[None], top_k, top_p)[0].astype(np.float64)
    expected = np.exp(kept - kept.max()) / np.exp(kept - kept.max()).sum()
    answers = generate_ids(
        base,
        [[3, 1, 4]] * draws,
        max_new_tokens=1,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        key=getkey(),
        batch_size=draws,
    )
    drawn = np.bincount([token for (token,) in answers], minlength=VOCAB_SIZE) / draws
    assert not drawn[expected == 0].any()
    error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(drawn - expected) <= 5 * error + 1 / draws)


def test_draws_depend_on_the_key_and_the_place_but_not_on_the_batch(getkey):
    base = toy_model(getkey(), tokenizer=False)
    prompts = [*random_prompts([3, 9, 31]), [8, 8], [8, 8]]
    key, sampling = getkey(), Sampling(temperature=2.0)

    def sample(key, batch_size, prompts=prompts):
        return generate_ids(
            base, prompts, sampling=sampling, key=key, batch_size=batch_size, max_new_tokens=12
        )

    answers = sample(key, 1)
    assert sample(key, 8) == answers
    assert sample(key, 2) == answers
    assert sample(key, 8, prompts[:2]) == answers[:2]
    assert answers[3] != answers[4]
    assert all(a != b for a, b in zip(answers, sample(getkey(), 8), strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-30])
def test_temperatures_near_zero_are_greedy(getkey, temperature):
    base = toy_model(getkey(), tokenizer=False)
    sampling = Sampling(temperature=temperature)
    answer = generate_ids(base, [[5, 6]], sampling=sampling, key=getkey(), max_new_tokens=8)
    assert answer == [greedy_without_cache(base, [5, 6], 8)]


# Prompts.


def test_chat_messages_are_rendered_up_to_the_assistants_turn(getkey):
    base = toy_model(getkey())
    messages = [{"role": "user", "content": "Hi"}]
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (ids,) = encode_prompts(base, [messages])
    assert ids == base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert generate(base, [messages], max_new_tokens=6) == generate(base, [text], max_new_tokens=6)


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q: a?", "completion": " b"}, "Q: a?"),
        ({"prompt": "<s>Q", "completion": "A"}, "<s>Q"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            [{"role": "user", "content": "u"}],
        ),
    ],
)
def test_prompts_are_the_tokens_that_training_puts_before_the_answer(getkey, bos, row, prompt):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(bos=bos))
    examples = encode_rows([row], base.tokenizer, max_length=100)
    (ids,) = encode_prompts(base, [prompt])
    first_learned = int(np.argmax(examples.masks[0]))
    assert ids == examples.tokens[0][:first_learned].tolist()


def test_generate_returns_the_text_of_the_new_ids_without_special_tokens(getkey):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(eos=False))
    likely = base.params["lm_head"]["kernel"].at[:, 2].mul(4.0)  # <s>
    base = base.replace(params={**base.params, "lm_head": {"kernel": likely}})
    prompts = ["abc", "Hello, you", "x", "?"]
    ids = [base.tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = [greedy_without_cache(base, row, 20) for row in ids]
    assert any(token == 2 for answer in answers for token in answer)
    table = {index: token for token, index in base.tokenizer.get_vocab().items()}
    expected = ["".join(table[t] for t in answer if t > 2) for answer in answers]
    assert generate(base, prompts, max_new_tokens=20) == expected


def test_no_prompts_give_no_answers(getkey):
    assert generate(toy_model(getkey()), []) == []


USER = {"role": "user", "content": "Hi"}
REFUSING = "{{ raise_exception('only on Sundays') }}"


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("Hello", {}, "square brackets"),
        (["a", ""], {}, "prompt 1 is empty"),
        (["a", []], {}, "prompt 1: no messages"),
        ([[{"role": "robot", "content": "Hi"}]], {}, 'prompt 0: .*unknown role "robot"'),
        ([[{"role": "user"}]], {}, 'prompt 0: .*content": missing'),
        ([[USER, {"role": "assistant", "content": "x"}]], {}, "prompt 0: .*two assistant turns"),
        (["a" * 120], {"max_new_tokens": 9}, "120 tokens and max_new_tokens=9 exceed .* 128"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a"], {"temperature": 1.0}, "needs a key"),
        (["a"], {"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        (["a"], {"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        (["a"], {"top_k": -1}, "top_k must be at least 0, got -1"),
        (["a"], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(getkey, prompts, options, words):
    with pytest.raises(UserError, match=words):
        generate(toy_model(getkey()), prompts, **options)


def test_one_conversation_is_no_list_of_prompts(getkey):
    past_the_type_check = inspect.unwrap(encode_prompts)
    with pytest.raises(UserError, match="square brackets"):
        past_the_type_check(toy_model(getkey()), [USER])


@pytest.mark.parametrize("ids", [[3, VOCAB_SIZE], [-1]])
def test_ids_outside_the_vocabulary_are_refused(getkey, ids):
    with pytest.raises(UserError, match=f"prompt 0: token id {ids[-1]} is outside .* {VOCAB_SIZE}"):
        generate_ids(toy_model(getkey(), tokenizer=False), [ids])


def test_a_template_that_refuses_the_messages_is_the_users_to_mend(getkey):
    base = toy_model(getkey(), tokenizer=toy_tokenizer(template=REFUSING))
    with pytest.raises(UserError, match=r"prompt 0: .*only on Sundays"):
        generate(base, [[USER]])


def test_a_model_without_tokenizer_or_template_says_so(getkey):
    with pytest.raises(UserError, match="toy: has no tokenizer"):
        generate(toy_model(getkey(), tokenizer=False), ["a"])
    with pytest.raises(UserError, match="no chat template"):
        generate(toy_model(getkey(), tokenizer=toy_tokenizer(template=None)), [[USER]])
