"""How far float32 may be from exact: a sum of ``n`` terms by at most ``n * UNIT * sum |terms|``."""

UNIT = 2.0**-24
"""The unit roundoff of float32."""


def most_roundings(config, seq, tokens=0, rank=0):
    """Roundings on the longest way from a factor to its gradient: the terms of all sums on it.

    A product sums its inner side on the way forward and its outer side on the way back; a norm and
    a softmax sum what they normalise both times. Logits need the way forward alone, and fewer.
    """
    width = config.num_heads * config.head_dim
    attended = 2 * (config.d_model + width) + 2 * (config.head_dim + seq) + 2 * seq
    fed = 2 * (config.d_model + config.d_ff)
    layer = attended + fed + 2 * 2 * config.d_model + 2 * 2 * rank
    head = 2 * config.d_model + (config.d_model + config.vocab_size) + 2 * config.vocab_size
    return config.num_layers * layer + head + tokens
