import io
import re

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.binding import init_adapter
from jaxpeft.methods.leaves.full import Full
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.summary import count_parameters, count_trainable, describe_adapter
from jaxpeft.reports.tables import (
    describe_run,
    evaluation_line,
    print_evaluation,
    print_final_table,
    print_run_table,
)

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def base(getkey):
    """Three layers of 8 x 8 and 8 x 4, an embedding and a head of 16 tokens, a norm."""
    return paths.unflatten(
        {
            "embed_tokens/embedding": jnp.zeros((16, 8)),
            "layers/self_attn/q_proj/kernel": jnp.zeros((3, 8, 8)),
            "layers/self_attn/v_proj/kernel": jnp.zeros((3, 8, 4)),
            "lm_head/kernel": jnp.zeros((8, 16)),
            "norm/scale": jnp.zeros(8),
        }
    )


def run_rows(**changes):
    options = {
        "trainable": 500,
        "base_parameters": 100_000,
        "dtypes": {"base": jnp.bfloat16, "adapter": "float32"},
        "tokens_per_epoch": 12_345,
        "supervised_per_epoch": 678,
        "rows": 640,
        "steps": 200,
        "epochs": 2.5,
        "batch_size": 8,
        "microbatch_size": None,
        "seq_len": 512,
        "mesh": {"data": 4, "fsdp": 1, "tensor": 2},
    }
    return dict(describe_run(**{**options, **changes}))


def test_lora_counts_rank_times_both_sides(getkey, base):
    adapter = init_adapter(LoRA(rank=2, targets=("q_proj", "v_proj")), base, getkey())
    rows = describe_adapter(base, adapter)
    assert rows == [
        ("layers/self_attn/q_proj/kernel", "3/3", "8 x 8", "2", 3 * 2 * (8 + 8)),
        ("layers/self_attn/v_proj/kernel", "3/3", "8 x 4", "2", 3 * 2 * (8 + 4)),
    ]
    assert count_trainable(adapter) == sum(leaf.size for leaf in jax.tree.leaves(adapter.params))


def test_layers_that_are_not_adapted_do_not_count(getkey, base):
    method = LoRA(rank=2, targets=r"model\.layers\.[02]\.self_attn\.q_proj")
    (row,) = describe_adapter(base, init_adapter(method, base, getkey()))
    assert (row.layers, row.trainable) == ("2/3", 2 * 2 * (8 + 8))


def test_padding_of_smaller_ranks_does_not_count():
    """Ranks 1, 0 and 3 padded to 3, with a magnitude for every output beside the factors."""
    path = "layers/mlp/up_proj/kernel"
    leaf = {"a": jnp.zeros((3, 8, 3)), "b": jnp.zeros((3, 3, 4)), "magnitude": jnp.zeros((3, 4))}
    adapter = Adapter(
        paths.unflatten({path: leaf}),
        paths.unflatten({path: {"rank": jnp.array([1, 0, 3])}}),
        Spec(kind="lora", paths=(path,), rank=3),
    )
    (row,) = describe_adapter(paths.unflatten({path: jnp.zeros((3, 8, 4))}), adapter)
    assert row == (path, "2/3", "8 x 4", "1-3", (1 + 3) * (8 + 4) + 2 * 4)


def test_a_bias_and_a_diagonal_count_for_the_layers_and_ranks_that_are_there():
    """Ranks 1, 0 and 2 padded to 2: a diagonal as wide as the rank, a bias of every output."""
    path = "layers/mlp/up_proj/kernel"
    leaf = {"e": jnp.zeros((3, 2)), "bias": jnp.zeros((3, 4))}
    adapter = Adapter(
        paths.unflatten({path: leaf}),
        paths.unflatten({path: {"rank": jnp.array([1, 0, 2])}}),
        Spec(kind="adalora", paths=(path,), rank=2),
    )
    assert count_trainable(adapter) == (1 + 2) + 2 * 4


def test_what_places_share_counts_in_full_and_has_a_row_of_its_own():
    path = "layers/mlp/up_proj/kernel"
    adapter = Adapter(
        {
            **paths.unflatten({path: {"d": jnp.zeros((3, 5))}}),
            "shared": {"table": jnp.zeros((7, 5))},
        },
        paths.unflatten({path: {"rank": jnp.array([1, 0, 1])}}),
        Spec(kind="lora", paths=(path,)),
    )
    rows = describe_adapter(paths.unflatten({path: jnp.zeros((3, 8, 4))}), adapter)
    assert [(row.path, row.shape, row.trainable) for row in rows] == [
        (path, "8 x 4", 2 * 5),
        ("shared/table", "7 x 5", 35),
    ]
    assert count_trainable(adapter) == 45


def test_leaves_that_the_method_freezes_do_not_count(getkey, base):
    adapter = init_adapter(LoRA(rank=2, targets=("q_proj",)), base, getkey())
    only_b = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "b", adapter.params)
    assert count_trainable(adapter, only_b) == 3 * 2 * 8
    assert describe_adapter(base, adapter, only_b)[0].trainable == 3 * 2 * 8


def test_a_soft_prompt_counts_its_own_numbers():
    adapter = Adapter(
        paths.unflatten({"embed_tokens/embedding": {"prompt": jnp.zeros((20, 8))}}),
        {},
        Spec(kind="prompt_tuning", paths=("embed_tokens/embedding",)),
    )
    assert count_trainable(adapter) == 20 * 8


def test_unstacked_kernels_count_as_one_layer(getkey, base):
    (row,) = describe_adapter(
        base, init_adapter(LoRA(rank=4, targets=("lm_head",)), base, getkey())
    )
    assert row == ("lm_head/kernel", "1/1", "8 x 16", "4", 4 * (8 + 16))


def test_full_fine_tuning_counts_every_parameter(getkey, base):
    adapter = init_adapter(Full(), base, getkey())
    total = 16 * 8 + 3 * 8 * 8 + 3 * 8 * 4 + 8 * 16 + 8
    assert count_trainable(adapter) == total
    assert count_parameters(base) == total
    assert {row.rank for row in describe_adapter(base, adapter)} == {"-"}
    assert describe_adapter(base, adapter)[-1] == ("norm/scale", "1/1", "8", "-", 8)


def test_shapes_are_enough_for_the_base_and_the_trained_arrays(getkey, base):
    adapter = init_adapter(LoRA(rank=2), base, getkey())
    shapes = jax.eval_shape(lambda: base)
    of_shapes = adapter.replace(params=jax.eval_shape(lambda: adapter.params))
    assert describe_adapter(shapes, of_shapes) == describe_adapter(base, adapter)


def test_run_table_says_percent_tokens_dtypes_and_devices():
    assert run_rows() == {
        "trainable": "500 of 100,000 parameters (0.5 %)",
        "dtypes": "base bfloat16, adapter float32",
        "data": "640 rows",
        "an epoch": "12,345 tokens, 678 supervised",
        "batch": "8 x 512 tokens",
        "steps": "200 (2.5 epochs)",
        "devices": "8 (data 4 x tensor 2)",
    }


def test_run_table_says_what_is_out_of_the_ordinary():
    rows = run_rows(dropped=3, truncated=1, microbatch_size=2, first_step=50, replicated=["a/b"])
    assert rows["data"] == "640 rows, 3 dropped, 1 truncated"
    assert rows["batch"] == "8 x 512 tokens, 2 at a time"
    assert rows["resumed"] == "after step 50"
    assert rows["replicated"] == "no sharding rule fits a/b"


def test_piped_tables_have_no_escape_codes_whatever_the_environment(getkey, base, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    modules = describe_adapter(base, init_adapter(LoRA(rank=2), base, getkey()))
    print_run_table(list(run_rows().items()), modules, stream=stream)
    assert ESCAPE not in stream.getvalue()
    line = next(line for line in stream.getvalue().splitlines() if "q_proj" in line)
    assert line.split() == ["layers/self_attn/q_proj/kernel", "3/3", "8", "x", "8", "2", "96"]


@pytest.mark.parametrize("no_color", [True, False])
def test_tables_on_a_terminal_are_coloured_unless_no_color_is_set(
    getkey, base, monkeypatch, no_color
):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    stream = Terminal()
    modules = describe_adapter(base, init_adapter(LoRA(rank=2), base, getkey()))
    print_run_table(list(run_rows().items()), modules, stream=stream)
    assert (ESCAPE in stream.getvalue()) is not no_color


def test_narrow_terminals_fold_and_lose_nothing(getkey, base, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    modules = describe_adapter(base, init_adapter(LoRA(rank=2), base, getkey()))
    print_run_table(list(run_rows().items()), modules, stream=stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    first_columns = "".join(re.split(r"\s", line)[0] for line in lines)
    assert "layers/self_attn/q_proj/kernel" in first_columns


def test_final_table_shows_metrics_side_by_side():
    stream = io.StringIO()
    before = {"step": 0, "eval_loss": 3.25, "eval_exact_match": 0.125}
    after = {"step": 200, "eval_loss": 0.5, "eval_exact_match": 0.81, "eval_perplexity": 1.6487}
    print_final_table(before, after, [("adapter", "runs/x/adapter")], stream=stream)
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert ["loss", "3.250", "0.500"] in rows
    assert ["exact", "match", "12.5", "%", "81.0", "%"] in rows
    assert ["perplexity", "-", "1.649"] in rows
    assert ["adapter", "runs/x/adapter"] in rows
    assert "step" not in stream.getvalue()


def test_final_table_without_evaluation_shows_only_the_rows():
    stream = io.StringIO()
    print_final_table(None, None, [("adapter", "runs/x/adapter")], stream=stream)
    assert stream.getvalue().split() == ["adapter", "runs/x/adapter"]


def test_tables_go_to_standard_output_and_evaluations_to_standard_error(capsys):
    print_run_table([("steps", "3")], [])
    print_evaluation(3, {"eval_loss": 1.0})
    out, err = capsys.readouterr()
    assert out.split() == ["steps", "3"]
    assert err == "evaluation at step 3: loss 1.000\n"


def test_evaluation_line_speaks_in_percent_and_skips_what_is_not_measured():
    metrics = {
        "step": 50,
        "eval_loss": 0.8125,
        "eval_perplexity": 2.25,
        "eval_token_accuracy": 0.812,
        "eval_exact_match": None,
    }
    assert evaluation_line(50, metrics) == (
        "evaluation at step 50: loss 0.812  perplexity 2.250  token accuracy 81.2 %"
    )
