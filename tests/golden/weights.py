"""Deterministic weights and input for the golden outputs beside this file.

Every tensor is drawn from numpy's frozen MT19937 stream, seeded by the CRC-32 of its
state-dict key, so the same weights can be rebuilt anywhere from the keys and shapes alone.
`keys_bn.json`, `keys_gn_ws.json` and `keys_beta.json` map each key of the published
checkpoint format to its shape, in order.
"""

import json
import zlib

import numpy as np


def tensor(key, shape):
    """float32 array of `shape` for the state-dict entry `key`."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.array(1, np.int64)
    if key.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    x = rng.standard_normal(shape).astype(np.float32)
    if key.endswith("running_mean") or key.endswith("bias"):
        return 0.1 * x
    if len(shape) == 1:  # norm weight
        return 1.0 + 0.1 * x
    return x * np.float32(np.sqrt(1.0 / np.prod(shape[1:])))


def state_dict(path):
    """{key: array} for one keys_*.json."""
    return {k: tensor(k, tuple(s)) for k, s in json.load(open(path)).items()}


def image(height=97, width=129, seed=0):
    """(1, 3, height, width) float32 normalised input."""
    return np.random.RandomState(seed).standard_normal((1, 3, height, width)).astype(np.float32)
