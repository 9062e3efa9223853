"""Slow, plain float64 layers in NumPy, for comparison with the models."""

import numpy as np
import scipy.special


def float64(tree):
    """Gives a nested dict of arrays in float64."""
    if hasattr(tree, "items"):
        return {name: float64(child) for name, child in tree.items()}
    return np.asarray(tree).astype(np.float64)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def layer_norm(p, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def self_attention(p, x, heads, causal):
    _, length, width = x.shape
    out = np.zeros_like(x)
    q, k, v = np.split(dense(p["qkv"], x), 3, axis=-1)
    size = width // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(size)
        if causal:
            logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
        out[..., part] = scipy.special.softmax(logits, -1) @ v[..., part]
    return dense(p["out"], out)


def transformer_block(p, x, heads, causal):
    x = x + self_attention(p["SelfAttention_0"], layer_norm(p["LayerNorm_0"], x), heads, causal)
    hidden = gelu(dense(p["Dense_0"], layer_norm(p["LayerNorm_1"], x)))
    return x + dense(p["Dense_1"], hidden)


def conv(p, x, stride):
    """Cross-correlation with a square kernel and padding such that ceil(size / stride) remain."""
    kernel = p["kernel"]
    size = kernel.shape[0]
    batch, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    pad_h = max((rows - 1) * stride + size - height, 0)
    pad_w = max((columns - 1) * stride + size - width, 0)
    pads = [(pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2)]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    out = np.zeros((batch, rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def batch_norm(p, running, x, train, momentum=0.9):
    """Gives the result and the new running statistics."""
    mean, var = running["mean"], running["var"]
    if train:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        running = {
            "mean": momentum * running["mean"] + (1 - momentum) * mean,
            "var": momentum * running["var"] + (1 - momentum) * var,
        }
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"], running
