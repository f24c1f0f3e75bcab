"""What the scores that decide about the best checkpoint were measured on, as one hash."""

import hashlib
import json

from jaxpeft.config.run_config import RunConfig
from jaxpeft.training.rows import Rows


def scored_on(config: RunConfig, rows: Rows) -> str:
    """A hash over all that decides what ``checkpoint.best`` of a state is.

    Args:
        config: The run.
        rows: Its data.

    Returns:
        Hex sha256; "" where nothing decides about the best.
    """
    best, examples = config.checkpoint.best, rows.eval_examples
    if best is None or examples is None:
        return ""
    digest = hashlib.sha256(best.encode())
    if best == "eval_exact_match":
        asked = [(q.prompt, q.text, q.reference, q.stop, q.task) for q in rows.questions]
        digest.update(json.dumps([config.evaluation.max_new_tokens, asked]).encode())
        return digest.hexdigest()
    for tokens, mask in zip(examples.tokens, examples.masks, strict=True):
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + mask.tobytes())
    return digest.hexdigest()
