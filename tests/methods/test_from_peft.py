"""Configs of HF PEFT as ours: the folders that PEFT wrote, its defaults, what is refused."""

import dataclasses
import enum
import functools
import json

import jax
import numpy as np
import pytest
from places import GOLDEN

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.binding import init_adapter
from jaxpeft.methods.kernels.ia3 import IA3
from jaxpeft.methods.kernels.loha import LoHa
from jaxpeft.methods.kernels.oft import OFT
from jaxpeft.methods.kernels.vera import VeRA
from jaxpeft.methods.leaves.ln_tuning import LNTuning
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.method import Method
from jaxpeft.methods.peft.values import Selection
from jaxpeft.methods.registry import KINDS
from jaxpeft.models.transformer import Transformer
from jaxpeft.pretrained.adapters import load_adapter
from jaxpeft.pretrained.load import load_params
from jaxpeft.pretrained.model import Model

FOLDERS = [
    file.parent
    for where in ("methods", "adapters")
    for file in sorted((GOLDEN / where).glob("*/adapter_config.json"))
]
NOT_OURS = {
    "loha_patterns": "rank_pattern",
    "lokr_low_rank": "alpha_pattern",
    "lora_mica": "init_lora_weights",
    "oft_blocks": "r",
}
"""Folders whose config our class of the method cannot say, and the key that the error names."""
NUMBERS = ("scale", "rank", "dropout", "rslora")


@functools.cache
def load_base(name):
    params, config, tokenizer, fingerprint = load_params(GOLDEN / "models" / name)
    return Model(params, config, Transformer(config), tokenizer, fingerprint, name)


def base_of(folder):
    values = json.loads((folder / "adapter_config.json").read_text())
    return load_base(values["base_model_name_or_path"])


def shapes(tree):
    return {path: tuple(leaf.shape) for path, leaf in paths.flatten(tree).items()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_method_of_a_folder_of_peft_starts_the_adapter_that_is_in_it(folder):
    if folder.name in NOT_OURS:
        with pytest.raises(UserError, match=f"adapter_config.json: {NOT_OURS[folder.name]}: "):
            Method.from_peft(folder)
        return
    base = base_of(folder)
    loaded = load_adapter(folder, base)
    method = KINDS[loaded.spec.kind].config.from_peft(folder)
    started = init_adapter(method, base, jax.random.key(0))
    assert started.spec.paths == loaded.spec.paths
    if loaded.spec.kind == "p_tuning":  # PEFT does not save the encoder
        assert method.encoder == folder.name.removeprefix("p_tuning_")
        ours, theirs = (paths.get(a.params, f"{paths.EMBEDDING}/prompt") for a in (started, loaded))
        assert ours.shape == theirs.shape
        return
    assert started.spec == loaded.spec
    assert shapes(started.params) == shapes(loaded.params)
    ours, theirs = (paths.flatten(adapter.buffers) for adapter in (started, loaded))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        if path.rpartition("/")[2] in NUMBERS:
            np.testing.assert_allclose(ours[path], value, rtol=1e-6, err_msg=path)


DEFAULTS = {
    "ADALORA": {
        "rank": 8,
        "initial_rank": 12,
        "alpha": 8.0,
        "targets": ("q_proj", "v_proj"),
        "orthogonality": 0.5,
        "beta1": 0.85,
    },
    "LORA": {
        "rank": 8,
        "alpha": 8.0,
        "targets": ("q_proj", "v_proj"),
        "dropout": 0.0,
        "rslora": False,
        "dora": False,
        "bias": "none",
        "init_weights": "default",
    },
    "LN_TUNING": {"targets": ("input_layernorm", "post_attention_layernorm", "norm")},
    "LOHA": {"rank": 8, "alpha": 8.0, "targets": ("q_proj", "v_proj")},
    "LOKR": {"rank": 8, "alpha": 8.0, "targets": ("q_proj", "v_proj"), "decompose_factor": -1},
    "OFT": {"block_size": 32, "exact": False, "terms": 5, "targets": ("q_proj", "v_proj")},
    "VERA": {"rank": 256, "d_initial": 0.1, "dropout": 0.0, "targets": ("q_proj", "v_proj")},
    "PROMPT_TUNING": {"num_tokens": 7, "initial": "random", "text": None},
    "MULTITASK_PROMPT_TUNING": {"num_tokens": 7, "num_tasks": 1, "rank": 1, "initial": "random"},
    "P_TUNING": {"num_tokens": 7, "encoder": "mlp", "hidden_size": None},
    "PREFIX_TUNING": {"num_tokens": 7, "initial": "random", "projection": False},
}
"""What PEFT 0.21 does where a config says nothing, read off its dataclasses and tables."""


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_config_leaves_out_has_pefts_default(kind):
    tokens = {"num_virtual_tokens": 7} if "num_tokens" in DEFAULTS[kind] else {}
    method = Method.from_peft({"peft_type": kind, **tokens})
    fields = dataclasses.asdict(method)
    assert {name: fields[name] for name in DEFAULTS[kind]} == DEFAULTS[kind]


def test_every_family_that_peft_has_can_be_made_from_its_config():
    assert [kind.name for kind in KINDS.values() if kind.peft and not kind.peft.config] == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"peft_type": "IA3", "target_modules": ["v_proj", "down_proj"]}, ("down_proj",)),
        ({"peft_type": "IA3", "target_modules": ["v_proj"]}, ()),
        ({"peft_type": "IA3", "target_modules": ["mlp.down_proj"]}, ("down_proj",)),
        (
            {"peft_type": "IA3", "target_modules": ["up_proj"], "feedforward_modules": ["up_proj"]},
            ("up_proj",),
        ),
    ],
)
def test_ia3_scales_those_targets_in_front_of_the_kernel_that_peft_does(values, expected):
    assert IA3.from_peft(values).feedforward == expected


def test_settings_of_training_alone_are_read_too():
    tuned = Method.from_peft(
        {"peft_type": "ADALORA", "target_r": 2, "init_r": 6, "tinit": 3, "tfinal": 4, "deltaT": 5}
    )
    assert (tuned.rank, tuned.initial_rank, tuned.initial_steps) == (2, 6, 3)
    assert (tuned.final_steps, tuned.every) == (4, 5)
    assert VeRA.from_peft({"peft_type": "VERA", "d_initial": 0.3}).d_initial == 0.3
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say:"}
    assert Method.from_peft(prompt | text).text == "Say:"
    assert Method.from_peft(prompt | {"prompt_tuning_init": "SAMPLE_VOCAB"}).initial == "sampled"
    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "encoder_hidden_size": 6}
    assert Method.from_peft(prefix).hidden_size is None
    assert Method.from_peft(prefix | {"prefix_projection": True}).hidden_size == 6
    assert Method.from_peft(prefix | {"init_weights": "zero"}).initial == "zero"


LORA = {"peft_type": "LORA"}
EVERYTHING = {
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.25,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    "target_modules": ["q_proj", "up_proj"],
    "exclude_modules": ["layers.2.mlp.up_proj"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "bias": "all",
    "modules_to_save": ["lm_head"],
}


def test_all_that_lora_can_say_is_read():
    assert LoRA.from_peft(LORA | EVERYTHING) == LoRA(
        rank=4,
        alpha=6.0,
        dropout=0.25,
        rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 5},
        targets=("q_proj", "up_proj"),
        exclude=("layers.2.mlp.up_proj",),
        layers=(0, 2),
        layers_pattern=("layers",),
        bias="all",
        save_modules=("lm_head",),
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"init_lora_weights": "gaussian"}, LoRA(init_weights="gaussian")),
        ({"init_lora_weights": "pissa_niter_16"}, LoRA(init_weights="pissa")),
        ({"init_lora_weights": "loftq"}, LoRA(init_weights="loftq")),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 3}},
            LoRA(init_weights="loftq", loftq_steps=3),
        ),
        ({"init_lora_weights": "eva"}, LoRA(init_weights="eva")),
        (
            {"init_lora_weights": "eva", "eva_config": {"rho": 1.5, "tau": 0.9, "whiten": False}},
            LoRA(init_weights="eva", eva_rho=1.5, eva_tau=0.9),
        ),
    ],
    ids=str,
)
def test_the_starts_of_lora_are_read(values, expected):
    ours = dataclasses.replace(expected, alpha=8.0, targets=("q_proj", "v_proj"))
    assert LoRA.from_peft(LORA | values) == ours


NAMES = [
    *(f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "mlp.up_proj")),
    "lm_head",
]


@pytest.mark.parametrize(
    "selection",
    [
        Selection(targets=("q_proj",), layers=(1, 11)),
        Selection(targets=("q_proj", "up_proj"), exclude=("layers.1.mlp.up_proj",), layers=(1, 3)),
        Selection(targets=("layers.1.self_attn.q_proj", "up_proj"), layers=(1, 2)),
        Selection(targets=("model.layers.0.mlp.up_proj", "q_proj"), layers=(1,)),
        Selection(targets=("q_proj", "lm_head"), layers=(0,), layers_pattern=("layers",)),
        Selection(targets=("_proj", "proj"), layers=(0,)),
        Selection(targets=("q_proj",)),
        Selection(targets=r".*\.[02]\..*up_proj"),
    ],
    ids=range(8),
)
def test_targets_with_layers_select_what_peft_selects(selection):
    fields = selection.fields("here")
    chosen = {
        name
        for name in NAMES
        if paths.name_matches(fields["targets"], name)
        and not (fields["exclude"] and paths.name_matches(fields["exclude"], name))
    }
    assert chosen == {name for name in NAMES if selection.selects(name)}


class FakeConfig:
    """As PEFT's own config objects answer: enums, sets, and all keys."""

    def to_dict(self):
        return {
            "peft_type": FakeKind.LOHA,
            "task_type": None,
            "target_modules": {"v_proj", "k_proj"},
            "inference_mode": False,
            "r": 5,
        }


class FakeKind(str, enum.Enum):  # noqa: UP042 (PEFT's enums are no StrEnum)
    LOHA = "LOHA"


def test_objects_files_folders_and_dicts_are_the_same(tmp_path):
    method = LoHa(rank=5, alpha=8.0, targets=("k_proj", "v_proj"))
    assert LoHa.from_peft(FakeConfig()) == method
    values = {"peft_type": "LOHA", "target_modules": ["k_proj", "v_proj"], "r": 5}
    assert LoHa.from_peft(values) == method
    file = tmp_path / "run" / "adapter" / "adapter_config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(values))
    for place in (file, str(file), file.parent, tmp_path / "run"):
        assert LoHa.from_peft(place) == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LORA", "init_lora_weights": False}, "init_lora_weights: expected true, "),
        ({"peft_type": "LORA", "init_lora_weights": "corda"}, "init_lora_weights: expected true, "),
        (
            {"peft_type": "LORA", "init_lora_weights": "eva", "eva_config": {"whiten": True}},
            "eva_config: expected whiten False",
        ),
        (
            {"peft_type": "LORA", "init_lora_weights": "eva", "eva_config": {"rho": "2"}},
            "eva_config: expected rho like 2.0",
        ),
        (
            {
                "peft_type": "LORA",
                "init_lora_weights": "loftq",
                "loftq_config": {"loftq_iter": 0.5},
            },
            "loftq_config: expected loftq_iter like 1",
        ),
        (
            {"peft_type": "LORA", "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
            "loftq_config: expected loftq_bits 4",
        ),
        ({"peft_type": "LORA", "use_qalora": True}, "not supported yet: use_qalora"),
        ({"peft_type": "LORA", "lora_dropout": 1}, "lora_dropout: expected a probability"),
        ({"peft_type": "LORA", "target_modules": []}, "LoRA.targets must name at least one"),
        ({"peft_type": "IA3"}, "target_modules: expected names or a regex"),
        ({"peft_type": "IA3", "target_modules": ["v"], "init_ia3_weights": False}, "init_ia3_w"),
        ({"peft_type": "LOHA", "rank_pattern": {"q_proj": 2}}, "rank_pattern: expected {}"),
        ({"peft_type": "LOHA", "r": 0}, "r: expected a whole number of at least 1"),
        ({"peft_type": "LOHA", "alpha": -1}, "LoHa.alpha must be finite and positive"),
        ({"peft_type": "LOHA", "modules_to_save": ["x"]}, "not supported yet: modules_to_save"),
        ({"peft_type": "LOHA", "module_dropout": 0.1}, "module_dropout: expected 0"),
        ({"peft_type": "LOKR", "rank_dropout": 0.1}, "rank_dropout: expected 0"),
        ({"peft_type": "LORA", "modules_to_save": ["norm"]}, "'norm' means input_layernorm, "),
        (
            {"peft_type": "LORA", "r": 3, "init_lora_weights": "orthogonal"},
            "LoRA.rank must be even",
        ),
        ({"peft_type": "LOKR", "init_weights": "lycoris"}, "init_weights: expected true"),
        ({"peft_type": "LOKR", "decompose_factor": 0}, "decompose_factor: expected"),
        ({"peft_type": "OFT", "module_dropout": 0.1}, "module_dropout: expected 0"),
        ({"peft_type": "OFT", "coft": True}, "not supported yet: coft"),
        ({"peft_type": "OFT", "target_modules": "q", "layers_to_transform": [1]}, "regex 'q'"),
        ({"peft_type": "OFT", "layers_to_transform": [1], "layers_pattern": "h"}, "layers_pattern"),
        ({"peft_type": "VERA", "vera_dropout": 1.0}, "vera_dropout: expected a probability"),
        ({"peft_type": "VERA", "d_initial": 0}, "VeRA.d_initial must be finite and not 0"),
        ({"peft_type": "ADALORA", "deltaT": 1.5}, "deltaT: expected a whole number of at least 1"),
        (
            {"peft_type": "ADALORA", "target_r": 0},
            "target_r: expected a whole number of at least 1",
        ),
        ({"peft_type": "ADALORA", "tinit": -1}, "tinit: expected a whole number of at least 0"),
        ({"peft_type": "ADALORA", "beta1": 7}, "beta1: expected a number above 0 and below 1"),
        ({"peft_type": "ADALORA", "orth_reg_weight": -1}, "orth_reg_weight: expected a number of"),
        ({"peft_type": "ADALORA", "init_lora_weights": "pissa"}, "init_lora_weights: expected"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens: expected a whole number"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"},
            "prompt_tuning_init_text: expected a text",
        ),
        (
            {
                "peft_type": "PROMPT_TUNING",
                "num_virtual_tokens": 2,
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "x",
                "base_model_name_or_path": "a",
                "tokenizer_name_or_path": "b",
            },
            "tokenizer_name_or_path: expected that of the base, 'a'",
        ),
        (
            {
                "peft_type": "MULTITASK_PROMPT_TUNING",
                "num_virtual_tokens": 2,
                "prompt_tuning_init": "EXACT_SOURCE_TASK",
            },
            'prompt_tuning_init: expected "RANDOM" or "TEXT"',
        ),
        (
            {
                "peft_type": "P_TUNING",
                "num_virtual_tokens": 2,
                "encoder_reparameterization_type": "LSTM",
                "encoder_num_layers": 3,
            },
            "encoder_num_layers: expected 2",
        ),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "init_weights": "ones"},
            'init_weights: expected null or "zero"',
        ),
        ({"peft_type": "LOHA", "surprise": 1}, "unknown settings: surprise=1"),
        ({"peft_type": ["LOHA"]}, "peft_type: .'LOHA'. is not supported"),
        ({}, "peft_type: None is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message) as caught:
        Method.from_peft(values)
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_config_of_another_method_names_the_class_to_call(tmp_path):
    with pytest.raises(UserError, match=r"describes VeRA; call VeRA\.from_peft"):
        OFT.from_peft({"peft_type": "VERA"})
    with pytest.raises(UserError, match=r"expected an adapter_config\.json, its .* got int"):
        LNTuning.from_peft(3)
    with pytest.raises(UserError, match="no such file; a PEFT folder has one"):
        LNTuning.from_peft(tmp_path)
