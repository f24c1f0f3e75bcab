"""Prompt tuning: laws that hold because soft prompts are tokens, and whole runs of it.

Expected values come from the base itself, fed with the very tokens a prompt was made of, from
NumPy, and from other ways to compute the same.
"""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import yaml
from tiny_decoder import CONFIG, apply, decoder, draw, make_batch
from tiny_run import evaluation_lines, make_files, training_lines, write_config
from toy_tokenizer import toy_tokenizer

import jaxpeft as jp
from jaxpeft import train as program
from jaxpeft.core import paths
from jaxpeft.data.batches import Plan
from jaxpeft.data.encode import Examples
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.methods.merging import head_is_frozen
from jaxpeft.methods.method import Context
from jaxpeft.methods.prompts.prompt import PromptTuning, prompt_adapter
from jaxpeft.models.config import ModelConfig
from jaxpeft.ops.linear import embed
from jaxpeft.pretrained.load import load_model, load_model_config
from jaxpeft.pretrained.model import Model
from jaxpeft.updates.losses import make_lm_loss

N = 3
UNTIED = ModelConfig(**{**dataclasses.asdict(CONFIG), "tie_embeddings": False})
IDS = (7, 40, 7)
TUNING = {"name": "prompt_tuning", "num_tokens": N}


def model(config=CONFIG, dtype=jnp.float32):
    module, params = decoder(config, dtype=dtype)
    return Model(params, config, module)


def prompt_of(rows, config=CONFIG):
    return prompt_adapter("prompt_tuning", {"prompt": jnp.asarray(rows)}, config.vocab_size)


def of_tokens(ids=IDS, config=CONFIG):
    """A prompt that holds the rows of real tokens."""
    return prompt_of(np.asarray(decoder(config)[1]["embed_tokens"]["embedding"])[list(ids)])


def drawn(seed=0, config=CONFIG):
    return prompt_of(draw(jnp.zeros((N, config.d_model)), seed, 0.3), config)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_a_prompt_of_real_rows_gives_exactly_the_logits_of_their_tokens_in_front(config):
    tokens = np.asarray(make_batch(2, 6)["tokens"])
    long = np.concatenate([np.tile(IDS, (2, 1)), tokens], axis=1)
    expected = model(config)(long)[:, N:]
    actual = model(config)(tokens, adapter=of_tokens(config=config))
    np.testing.assert_array_equal(actual, expected)


def test_a_packed_row_gives_every_segment_its_own_prompt():
    base, adapter = model(), drawn()
    tokens = np.asarray(make_batch(2, 9)["tokens"])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 2]])
    packed = np.asarray(base(tokens, adapter=adapter, segment_ids=segments))
    assert packed.shape == (2, 9, CONFIG.vocab_size)
    for row, start, stop in ((0, 0, 3), (0, 3, 7), (1, 0, 8), (1, 8, 9)):
        alone = base(tokens[row : row + 1, start:stop], adapter=adapter)[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, rtol=1e-5, atol=1e-5)


def test_given_positions_move_behind_the_prompt():
    base, adapter = model(), drawn()
    tokens = np.asarray(make_batch(2, 5)["tokens"])
    positions = np.array([[0, 1, 4, 6, 7]] * 2)
    actual = base(tokens, adapter=adapter, positions=positions)
    masked = base(tokens, adapter=adapter, positions=positions, segment_ids=np.ones((2, 5), int))
    module, params = decoder()
    long = np.concatenate([[[0, 1, 2]] * 2, positions + N], axis=1)
    ids = jp.with_prompt(adapter, tokens)
    expected = apply(module, jp.bind(params, adapter), ids, positions=long)[:, N:]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(masked, expected, rtol=1e-5, atol=1e-5)


def test_with_prompt_writes_ids_behind_the_vocabulary_in_front_of_segments():
    v = CONFIG.vocab_size
    tokens = np.array([[5, 6, 7, 8], [9, 4, 0, 0]])
    np.testing.assert_array_equal(
        jp.with_prompt(drawn(), tokens),
        [[v, v + 1, v + 2, 5, 6, 7, 8], [v, v + 1, v + 2, 9, 4, 0, 0]],
    )
    long = jp.with_prompt(drawn(), tokens, np.array([[1, 2, 2, 0], [1, 1, 0, 0]]))
    prompt = [v, v + 1, v + 2]
    np.testing.assert_array_equal(
        long.input_ids, [[*prompt, 5, *prompt, 6, 7, 8], [*prompt, 9, 4, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        long.segment_ids, [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        long.positions, [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(long.places, [[3, 7, 8, 9], [3, 4, 5, 6]])


def test_with_prompt_is_the_identity_for_other_methods():
    tokens = np.array([[5, 6, 7, 8]])
    lora = jp.init_adapter(jp.LoRA(rank=1), decoder()[1], jax.random.key(0))
    for adapter in (None, lora):
        assert jp.with_prompt(adapter, tokens) is tokens
        long = jp.with_prompt(adapter, tokens, np.array([[1, 1, 2, 0]]))
        np.testing.assert_array_equal(long.input_ids, tokens)
        np.testing.assert_array_equal(long.positions, [[0, 1, 0, 0]])


def test_traced_segments_are_refused_with_the_way_out():
    tokens = np.ones((1, 4), np.int32)
    with pytest.raises(jp.UserError, match="outside of jit"):
        jax.jit(lambda s: model()(tokens, adapter=drawn(), segment_ids=s))(tokens)


def test_a_prompt_stands_beside_a_lora():
    base, adapter = model(), of_tokens()
    lora = jp.init_adapter(jp.LoRA(rank=2), base.params, jax.random.key(0))
    lora = lora.replace(params=draw(lora.params, seed=3, scale=0.2))
    tokens = np.asarray(make_batch(2, 6)["tokens"])
    long = np.concatenate([np.tile(IDS, (2, 1)), tokens], axis=1)
    both = [adapter, lora]
    actual = apply(base.module, jp.bind(base.params, both), jp.with_prompt(both, tokens))
    np.testing.assert_allclose(actual, base(long, adapter=lora), rtol=1e-5, atol=1e-5)


def test_two_prompts_on_one_base_are_refused():
    with pytest.raises(jp.UserError, match="two soft prompts"):
        jp.bind(decoder()[1], [drawn(), drawn(1)])


def test_a_bfloat16_table_rounds_the_prompt_as_peft_does():
    table = jnp.asarray(decoder()[1]["embed_tokens"]["embedding"], jnp.bfloat16)
    adapter = drawn()
    bound = jp.bind({"embed_tokens": {"embedding": table}}, adapter)["params"]
    rows = embed(jnp.array([5, CONFIG.vocab_size + 1]), bound["embed_tokens"]["embedding"])
    prompt = paths.get(adapter.params, paths.EMBEDDING)["prompt"]
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[1], prompt[1].astype(jnp.bfloat16))
    np.testing.assert_array_equal(rows[0], table[5])


def test_a_prompt_of_another_base_is_refused():
    small = ModelConfig(**{**dataclasses.asdict(CONFIG), "vocab_size": 40})
    with pytest.raises(jp.UserError, match=r"made for shape \(48, 16\), this base has \(40, 16\)"):
        jp.bind(decoder(small)[1], drawn())


# Where a prompt starts.


def test_sampled_rows_are_rows_of_the_table():
    table = np.asarray(decoder()[1]["embed_tokens"]["embedding"])
    adapter = PromptTuning(num_tokens=30).init(decoder()[1], jax.random.key(3))
    rows = np.asarray(paths.get(adapter.params, paths.EMBEDDING)["prompt"])
    found = [np.flatnonzero((table == row).all(1)) for row in rows]
    assert all(len(at) == 1 for at in found)
    assert len({int(at[0]) for at in found}) > 10


def test_random_rows_are_standard_normal():
    adapter = PromptTuning(num_tokens=500, initial="random").init(decoder()[1], jax.random.key(3))
    rows = np.asarray(paths.get(adapter.params, paths.EMBEDDING)["prompt"])
    assert abs(rows.mean()) < 4 / math.sqrt(rows.size)
    assert rows.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("count", "repeats"), [(2, "ab"), (3, "abc"), (7, "abcabca")])
def test_a_text_is_cut_or_repeated(count, repeats):
    tokenizer = toy_tokenizer()
    ids = [tokenizer(letter)["input_ids"][-1] for letter in repeats]
    assert tokenizer("abc")["input_ids"] == [tokenizer(c)["input_ids"][-1] for c in "abc"]
    config = ModelConfig(**{**dataclasses.asdict(CONFIG), "vocab_size": len(tokenizer)})
    method = PromptTuning(num_tokens=count, initial="text", text="abc")
    params = decoder(config)[1]
    adapter = method.init(params, jax.random.key(0), Context(tokenizer=tokenizer))
    np.testing.assert_array_equal(
        paths.get(adapter.params, paths.EMBEDDING)["prompt"],
        np.asarray(params["embed_tokens"]["embedding"])[ids],
    )


def test_a_text_needs_a_tokenizer():
    method = PromptTuning(initial="text", text="abc")
    with pytest.raises(jp.UserError, match="needs a tokenizer"):
        jp.init_adapter(method, decoder()[1], jax.random.key(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": 0}, r"PromptTuning\.num_tokens must be a whole number of at least 1"),
        ({"num_tokens": True}, r"PromptTuning\.num_tokens"),
        ({"initial": "zero"}, r"PromptTuning\.initial must be one of sampled, random, text"),
        ({"initial": "text"}, r"PromptTuning\.text must be given"),
        ({"text": "abc"}, r"PromptTuning\.text must be given"),
    ],
)
def test_nonsense_is_refused(values, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    with pytest.raises(ValueError, match=message):
        PromptTuning(**values)


# Training.


def loss_and_grad(adapter, batch, remat="none", frozen=True):
    module, params = decoder(remat=remat)
    loss = make_lm_loss(module, head_frozen=frozen)

    def total(p, batch):
        return loss(params, adapter.replace(params=p), batch)[0]

    return jax.jit(jax.value_and_grad(total))(adapter.params, batch)


def examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return Examples(
        [rng.integers(3, CONFIG.vocab_size, n).astype(np.int32) for n in lengths],
        [np.arange(n) >= n // 2 for n in lengths],
        list(range(1, len(lengths) + 1)),
        [{}] * len(lengths),
        {},
        0,
        "memory",
        "",
    )


def close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), actual, expected
    )


def prefix(count=N):
    return CONFIG.vocab_size + np.arange(count, dtype=np.int32)


def plan(rows, packing, batch_size):
    return Plan(rows, batch_size=batch_size, max_length=20, packing=packing)


def test_packed_loss_and_gradient_equal_unpacked_ones():
    rows = examples([4, 6, 5, 4]).with_prefix(prefix())
    packed, unpacked = plan(rows, True, 2).batch(0), plan(rows, False, 4).batch(0)
    assert packed["segment_ids"].max() == 2
    close(loss_and_grad(drawn(), packed), loss_and_grad(drawn(), unpacked))


def test_loss_is_that_of_the_logits_at_the_supervised_tokens():
    rows = examples([4, 6])
    expected = 0.0
    for tokens, mask in zip(rows.tokens, rows.masks, strict=True):
        logits = np.asarray(model()(tokens[None], adapter=drawn()), np.float64)[0]
        picked = logits[np.arange(len(tokens) - 1), tokens[1:]]
        losses = np.log(np.exp(logits[:-1]).sum(-1)) - picked
        expected += (losses * mask[1:]).sum()
    loss, _ = loss_and_grad(drawn(), plan(rows.with_prefix(prefix()), True, 1).batch(0))
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_loss_nor_gradient(remat):
    batch = plan(examples([4, 6, 5, 4]).with_prefix(prefix()), True, 2).batch(0)
    close(loss_and_grad(drawn(), batch, remat), loss_and_grad(drawn(), batch))


def test_the_fused_loss_of_a_frozen_head_is_right_for_a_tied_table():
    assert head_is_frozen(decoder()[1], drawn())
    batch = plan(examples([4, 6, 5, 4]).with_prefix(prefix()), True, 2).batch(0)
    close(loss_and_grad(drawn(), batch, frozen=True), loss_and_grad(drawn(), batch, frozen=False))


def test_a_prefix_keeps_the_supervised_tokens_and_changes_the_plans_hash():
    rows = examples([4, 6, 5, 4])
    rows.masks[0][:] = True
    bare, long = plan(rows, True, 1), plan(rows.with_prefix(prefix()), True, 1)
    assert long.supervised_tokens_per_epoch == bare.supervised_tokens_per_epoch
    assert long.tokens_per_epoch == bare.tokens_per_epoch + 4 * N
    longer = plan(rows.with_prefix(prefix(2)), True, 1)
    assert len({bare.hash, long.hash, longer.hash}) == 3
    assert rows.with_prefix(prefix(0)) is rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of a run that was done once; look at it, don't change it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    program.main([write_config(files, output, **CHANGES)])
    return output


CHANGES = {
    "method": TUNING,
    "optim": {"learning_rate": 0.3},
    "evaluation": {"exact_match": True, "max_new_tokens": 3},
}


def test_a_run_trains_nothing_but_the_prompt(finished, files):
    losses = [line["loss"] for line in training_lines(finished)]
    assert losses[-1] < 0.95 * losses[0]
    base = load_model(files.model)
    adapter = jp.load_adapter(finished, base)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter.params)) == N * base.config.d_model
    values = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["num_virtual_tokens"]) == ("PROMPT_TUNING", N)


def test_the_commands_agree_with_the_run(finished, files, capsys):
    from jaxpeft.inference.metrics import evaluate_file

    base = load_model(files.model)
    adapter = jp.load_adapter(finished, base)
    scores = evaluate_file(
        base, str(files.eval), {"base": None, "ours": adapter}, max_length=32, max_new_tokens=3
    )
    last = evaluation_lines(finished)[-1]
    assert scores["ours"]["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert scores["ours"]["eval_exact_match"] == last["eval_exact_match"]
    assert scores["base"]["eval_loss"] != pytest.approx(last["eval_loss"], rel=1e-2)


def test_a_run_stopped_and_resumed_is_bit_identical(finished, files, tmp_path):
    output = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    for step in (output / "checkpoints").iterdir():
        if int(step.name) > 9:
            shutil.rmtree(step)
    shutil.rmtree(output / "adapter")
    config = yaml.safe_load(finished.with_name("run.yaml").read_text())
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config | {"output_dir": str(output)}))
    program.main([str(path)])
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (finished / name).read_bytes()


def test_virtual_tokens_count_in_the_length_of_a_row(files, tmp_path):
    config = write_config(files, tmp_path / "run", method=TUNING, data={"max_length": 8})
    message = r"7 tokens and 3 virtual tokens, more than max_length 8.*max_length to 10"
    with pytest.raises(jp.UserError, match=r"(?s)" + message):
        program.main([config])
    cut = jp.load_config(config, ["--data.on_long=drop", "--data.max_length=3"])
    with pytest.raises(jp.UserError, match="leaves no room behind 3 virtual tokens"):
        program.read_data(cut, load_model_config(files.model))


# Decoding.


def test_generation_equals_greedy_decoding_without_a_cache():
    base, adapter = model(), drawn(seed=4)
    prompts = [[5, 6, 7], [9], [3, 4, 3, 4, 8]]
    actual = generate_ids(base, prompts, adapter=adapter, max_new_tokens=5)
    for prompt, answer in zip(prompts, actual, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(base(np.array([ids]), adapter=adapter)[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


def test_virtual_tokens_count_in_the_positions_of_a_model():
    base = dataclasses.replace(model(), config=dataclasses.replace(CONFIG, max_positions=8))
    generate_ids(base, [[5, 6, 7, 8]], max_new_tokens=4)
    with pytest.raises(jp.UserError, match="3 virtual tokens, its 4 tokens"):
        generate_ids(base, [[5, 6, 7, 8]], adapter=drawn(), max_new_tokens=4)


def test_prompts_of_equal_length_share_one_compilation():
    base = model()
    tokens = np.asarray(make_batch(2, 6)["tokens"])
    base(tokens, adapter=drawn(1))
    from jaxpeft.pretrained.model import _logits

    before = _logits._cache_size()
    base(tokens, adapter=drawn(2))
    assert _logits._cache_size() == before
