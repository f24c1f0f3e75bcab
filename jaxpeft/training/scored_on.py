"""A hash of everything that the scores of checkpoints were measured on."""

import hashlib
import json

from jaxpeft.config.run_config import RunConfig
from jaxpeft.training.rows import Rows


def scored_on(config: RunConfig, rows: Rows) -> str:
    """A hash over everything that determines the ``checkpoint.best`` score of a state.

    Args:
        config: The run.
        rows: Its data.

    Returns:
        Hex sha256; "" if the config does not choose by a score.
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
