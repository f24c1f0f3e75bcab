"""What differs between the jaxprs of the versions of JAX that are supported."""

from typing import Any

INLINED = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINT = "remat2"
KNOWN = {
    "scan": (
        {"jaxpr", "length", "linear", "num_carry", "num_consts", "reverse", "unroll"},
        {"jaxpr", "length", "num_carry", "num_consts", "reverse", "unroll"},
        {"ft_in", "ft_out", "jaxpr", "length", "reverse", "unroll"},
    ),
    "while": ({"body_jaxpr", "body_nconsts", "cond_jaxpr", "cond_nconsts"},),
    "cond": ({"branches"},),
    "conv_general_dilated": (
        {
            *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
            *("feature_group_count", "batch_group_count", "precision", "preferred_element_type"),
            "out_sharding",
        },
    ),
    "remat2": ({"differentiated", "jaxpr", "policy", "prevent_cse"},),
}
"""The parameters of rebuilt primitives that this package understands, a set for each version."""


def is_known(eqn: Any) -> bool:
    """Whether a primitive has the parameters of a version of JAX that is known."""
    return set(eqn.params) in KNOWN[eqn.primitive.name]


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The number of constants and of carried values of a scan."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]
