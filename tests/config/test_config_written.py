"""Configs written out: they read back equal; every method and key is reached by its name."""

import copy
import dataclasses
import pickle
import re

import pytest
import yaml
from config_values import SMALL, Values
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.config import run_config as cfg
from jaxpeft.config import sections
from jaxpeft.config.schema import Schema, describe, dotted_values
from jaxpeft.config.yaml_reader import loads
from jaxpeft.config.yaml_writer import dumps
from jaxpeft.core.errors import UserError
from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.data.settings import DataConfig
from jaxpeft.methods.leaves.full import Full
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.registry import METHODS
from jaxpeft.updates.optimizers import OptimConfig


def record(cls, **fields):
    """A class and its arguments: checked classes draw random numbers, so build them later."""
    return st.tuples(st.just(cls), st.fixed_dictionaries(fields))


def build(drawn):
    cls, fields = drawn
    return cls(
        **{
            name: build(value) if isinstance(value, tuple) and type(value[-1]) is dict else value
            for name, value in fields.items()
        }
    )


def is_regex(text):
    try:
        re.compile(text)
    except (re.error, OverflowError, FutureWarning):
        return False
    return True


words = st.text(min_size=1, max_size=12).filter(str.strip)
places = words.filter(lambda text: "\0" not in text)
regexes = words.filter(is_regex)
lists = st.lists(words, min_size=1, max_size=3).map(tuple)
positive = st.integers(1, 2**16)
configs = record(
    cfg.RunConfig,
    model=record(sections.ModelSection, path=places, revision=st.none() | words),
    method=record(Full)
    | record(
        LoRA,
        rank=positive,
        alpha=st.floats(1e-37, 1e38),
        dropout=st.floats(0, 1, exclude_max=True, width=32, allow_subnormal=False),
        targets=regexes | lists,
        exclude=regexes | lists,
        rslora=st.booleans(),
    ),
    data=record(DataConfig, train=places, eval=places, packing=st.booleans()),
    optim=record(OptimConfig, clip_norm=st.none() | st.floats(1e-9, 1e9), trainable=lists),
    train=record(sections.TrainSection, steps=positive)
    | record(sections.TrainSection, epochs=st.floats(1e-3, 1e6)),
    evaluation=record(sections.EvaluationSection, every=st.none() | positive),
    output_dir=places,
)


@settings(deadline=None, max_examples=50)
@given(drawn=configs)
def test_written_config_reads_back_equal(drawn):
    config = build(drawn)
    text = cfg.to_yaml(config)
    assert loads(cfg.SCHEMA, text, "c.yaml") == config
    assert cfg.to_yaml(loads(cfg.SCHEMA, text, "c.yaml")) == text
    assert list(yaml.safe_load(text)) == [f.name for f in dataclasses.fields(cfg.RunConfig)]


def test_every_key_is_written_out(load):
    written = yaml.safe_load(cfg.to_yaml(load(SMALL)))
    fields = {field.name for field in dataclasses.fields(LoRA)}
    assert set(written["method"]) == {"name", *fields}
    expected = {"name": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear", "exclude": []}
    assert expected.items() <= written["method"].items()
    known = {key.path for key in cfg.SCHEMA.keys if key.variant in ("", "lora")}
    assert set(dotted_values(load(SMALL))) == known


def test_hash_changes_with_the_numbers_and_not_with_the_place(load):
    first = cfg.config_hash(load(SMALL))
    assert len(bytes.fromhex(first)) == 32
    same = "--output_dir x --evaluation.every 3 --checkpoint.keep 1 --mesh.fsdp 2 --data.workers 1 "
    same += "--track.tensorboard true --data.eval other.jsonl"
    assert cfg.config_hash(load(SMALL, *same.split())) == first
    for other in ("--train.seed 1", "--method.rank 4", "--data.train x", "--optim.name sgd"):
        assert cfg.config_hash(load(SMALL, *other.split())) != first


def test_diff_lists_what_changed(load):
    old = load(SMALL)
    new = load(SMALL, "--train.seed", "3", "--optim.trainable", "a")
    assert cfg.diff(old, old) == []
    assert cfg.diff(old, new) == [("optim.trainable", [], ["a"]), ("train.seed", 0, 3)]
    changed = cfg.diff(old, load(SMALL, "--method", "{name: full}"))
    assert ("method.name", "lora", "full") in changed
    assert ("method.rank", 8, None) in changed


def test_every_key_has_a_sentence_in_the_help():
    lines = describe(cfg.SCHEMA).split("\n  --")
    assert len(lines) == len(cfg.SCHEMA.keys)
    assert [line for line in lines if not line.rstrip().endswith(".")] == []


def test_methods_carry_the_name_they_are_registered_by():
    assert {name: method.name for name, method in METHODS.items()} == {n: n for n in METHODS}


REQUIRED = {"trainable_tokens": ", token_ids: [3, 5]"}
"""What a method's section must say beside its name."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_reached_by_its_name_and_reads_back_equal(load, name):
    config = load(SMALL.replace("{name: lora}", f"{{name: {name}{REQUIRED.get(name, '')}}}"))
    assert type(config.method) is METHODS[name]
    assert load(cfg.to_yaml(config)) == config
    assert hash(config.method) == hash(load(cfg.to_yaml(config)).method)


def test_names_with_values_are_read_in_order_and_write_themselves_back():
    text = "ranks: {down_proj: 16, 'layers.0.*q_proj': 4}\nalphas:\n  b: 1e1\n  a: 2\n"
    read = loads(Schema(Values), text, "v.yaml")
    assert list(read.ranks.items()) == [("down_proj", 16), ("layers.0.*q_proj", 4)]
    assert list(read.alphas.items()) == [("b", 10.0), ("a", 2.0)]
    assert all(isinstance(alpha, float) for alpha in read.alphas.values())
    assert loads(Schema(Values), dumps(read), "v.yaml") == read


@pytest.mark.parametrize(
    "flags",
    [
        ["--ranks", "{down_proj: 16, up_proj: 2}"],
        ["--ranks={down_proj: 16, up_proj: 2}"],
        ["--ranks.down_proj", "16", "--ranks.up_proj", "2"],
    ],
)
def test_flags_give_names_with_values(flags):
    assert loads(Schema(Values), "count: 1\n", "v.yaml", flags).ranks == {
        "down_proj": 16,
        "up_proj": 2,
    }


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "ranks: {q_proj: 1.5}",
            "v.yaml:1: ranks.q_proj: expected a whole number, got 1.5",
        ),
        (
            "ranks: 8",
            "v.yaml:1: ranks: expected names, each with a whole number, got 8",
        ),
        (
            "alphas: [a, b]",
            "v.yaml:1: alphas: expected names, each with a number, got a list",
        ),
        (
            "ranks:\n  a: 1\n  a: 2",
            "v.yaml:3: ranks.a: given twice, also on line 2; keep one of the two",
        ),
    ],
)
def test_names_with_wrong_values_are_refused_where_they_stand(line, problem):
    with pytest.raises(UserError) as caught:
        loads(Schema(Values), line + "\n", "v.yaml")
    assert str(caught.value) == problem


def test_a_mapping_is_one_key_and_its_order_is_part_of_it():
    first, second = (
        Values(ranks=FrozenMap({"a": 1, "b": 2})),
        Values(ranks=FrozenMap({"b": 2, "a": 1})),
    )
    assert dotted_values(first)["ranks"] == {"a": 1, "b": 2}
    assert first != second
    assert FrozenMap({"a": 1}) == {"a": 1}


def test_a_frozen_map_can_be_hashed_copied_and_not_changed():
    patterns = FrozenMap({"q_proj": 4})
    assert hash(patterns) == hash(FrozenMap([("q_proj", 4)]))
    assert copy.deepcopy(patterns) == pickle.loads(pickle.dumps(patterns)) == patterns
    with pytest.raises(AttributeError, match="cannot be changed"):
        patterns.q_proj = 8
    with pytest.raises(TypeError):
        patterns["q_proj"] = 8  # pyright: ignore
