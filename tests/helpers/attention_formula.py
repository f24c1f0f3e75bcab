"""Attention's formula and its gradients in float64 NumPy, who sees whom, and packed rows."""

import numpy as np


def formula(q, k, v, mask, slope):
    """Softmax attention and its gradients, whole matrices in float64; `mask` is (b, q, k)."""
    q, k, v, slope = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, slope))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = 1 / np.sqrt(q.shape[-1])
    scores = np.where(mask[:, None], q @ k.swapaxes(2, 3) * scale, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    dp = slope @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale

    def over_group(x):
        return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(axis=2)

    dk, dv = over_group(ds.swapaxes(2, 3) @ q), over_group(p.swapaxes(2, 3) @ slope)
    return [x.swapaxes(1, 2) for x in (p @ v, ds @ k, dk, dv)]


def seen(positions, ids, window, ahead=0, used=None):
    """Who sees whom, from the definition: (batch, seq, ahead + seq)."""
    batch, seq = ids.shape
    mask = np.zeros((batch, seq, ahead + seq), bool)
    for b, i, j in np.ndindex(mask.shape):
        first = j < ahead
        where = j if first else positions[b, j - ahead]
        same = (used is None or used[b]) if first else ids[b, i] == ids[b, j - ahead]
        far = positions[b, i] - where
        mask[b, i, j] = ids[b, i] and same and far >= 0 and (not window or far < window)
    return mask


def rows_of(lengths, seq, ahead=0):
    """Segment ids and positions of rows packed from segments of these lengths, padded."""
    ids = np.zeros((len(lengths), seq), np.int32)
    positions = np.zeros((len(lengths), seq), np.int32)
    for row, segments in enumerate(lengths):
        start = 0
        for number, length in enumerate(segments, 1):
            there = slice(start, min(start + length, seq))
            ids[row, there] = number
            positions[row, there] = ahead + np.arange(there.stop - start)
            start = there.stop
    return ids, positions


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
