"""Flax models written in float32, each with the bfloat16 twin that people write by hand today.

`ZOO[name].build(size, dtype)` gives a `Model`; with `dtype=None` the source is plain float32, with
`dtype=jnp.bfloat16` the same source passes `dtype=` to every module, and parameters stay float32.
All use Flax's own modules (Linen or NNX) after well-known public designs; `resnet18-jax-resnet` and
`gpt2-transformers` are other people's code, taken from the packages of these names if installed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

Dtype = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a model and its batch."""

    width: int
    depth: int
    heads: int
    vocab: int
    length: int
    batch: int
    side: int
    channels: int
    classes: int

    def random_batch(self, kind: str, seed: int = 0) -> dict[str, np.ndarray]:
        """A batch of noise for models of a kind; the tokens are one more than `length`."""
        rng = np.random.default_rng(seed)
        batch: dict[str, np.ndarray] = {}
        if kind in ("text", "captions", "speech"):
            shape = (self.batch, self.length + 1)
            batch["tokens"] = rng.integers(self.vocab, size=shape, dtype=np.int32)
        if kind == "speech":  # as many frames of a spectrogram as tokens
            spectrograms, waves = (80, self.length), (64 * self.length,)
            batch["spectrograms"] = rng.normal(size=(self.batch, *spectrograms)).astype(np.float32)
            batch["waves"] = rng.normal(size=(self.batch, *waves)).astype(np.float32)
        if kind in ("images", "captions"):
            shape = (self.batch, self.side, self.side, self.channels)
            batch["labels"] = rng.integers(self.classes, size=self.batch, dtype=np.int32)
            batch["images"] = rng.uniform(size=shape).astype(np.float32)
        return batch


SMALL = Size(64, 2, 2, vocab=256, length=32, batch=16, side=8, channels=1, classes=10)
LARGE = Size(512, 4, 8, vocab=8192, length=256, batch=32, side=64, channels=3, classes=1000)


class Model(NamedTuple):
    """A model as functions."""

    init: Callable[[Any], tuple[Any, Any]]
    """key -> (params, state); state holds running statistics, {} for none."""
    loss: Callable[..., tuple[jax.Array, Any]]
    """(params, state, batch, key) -> (loss, state), in training mode."""


class Entry(NamedTuple):
    """A model of the zoo."""

    kind: str
    """What it eats: "text", "images", both as "captions", or "speech"."""
    build: Callable[[Size, Dtype | None], Model]
    package: str = ""
    """The package that it is from, if not Flax."""


def token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next token, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of the class, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen_model(module: nn.Module, size: Size, kind: str) -> Model:
    """A Linen module of tokens or images that returns logits, or a loss where its name says so."""
    inputs = lambda batch: batch["tokens"][:, :-1] if kind == "text" else batch["images"]

    def init(key: Any) -> tuple[Any, Any]:
        variables = dict(
            module.init({"params": key, "dropout": key}, inputs(size.random_batch(kind)))
        )
        return variables.pop("params"), variables

    def loss(params: Any, state: Any, batch: dict, key: Any) -> tuple[jax.Array, Any]:
        outputs, state = module.apply(
            {"params": params, **state},
            inputs(batch),
            rngs={"dropout": key},
            mutable=list(state),
        )
        if kind == "text":
            return token_loss(outputs, batch["tokens"]), state
        return outputs if outputs.ndim == 0 else label_loss(outputs, batch["labels"]), state

    return Model(init, loss)


# --- transformers -------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block, pre- or post-norm, as `nn.scan` wants it."""

    size: Size
    dtype: Dtype | None = None
    causal: bool = True
    post: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        width, dtype = self.size.width, self.dtype
        norm = lambda: nn.LayerNorm(dtype=dtype)
        drop = nn.Dropout(self.dropout, deterministic=not self.dropout)

        def attend(y: jax.Array) -> jax.Array:
            mask = nn.make_causal_mask(jnp.ones(y.shape[:2])) if self.causal else None
            attention = nn.MultiHeadDotProductAttention(self.size.heads, dtype=dtype)
            return drop(attention(y, mask=mask))

        def mlp(y: jax.Array) -> jax.Array:
            hidden = nn.gelu(nn.Dense(4 * width, dtype=dtype)(y))
            return drop(nn.Dense(width, dtype=dtype)(hidden))

        for branch in (attend, mlp):
            x = norm()(x + branch(x)) if self.post else x + branch(norm()(x))
        return x, None


def stack(cls: Any, depth: int, scanned: bool, remat: bool, x: jax.Array, **fields: Any) -> Any:
    """`depth` blocks, unrolled or scanned, perhaps rematerialised."""
    cls = nn.remat(cls, prevent_cse=not scanned) if remat else cls
    if scanned:
        rngs = {"params": True, "dropout": True}
        cls = nn.scan(cls, variable_axes={"params": 0}, split_rngs=rngs, length=depth)
        return cls(**fields)(x, None)[0]
    for _ in range(depth):
        x, _ = cls(**fields)(x, None)
    return x


class Transformer(nn.Module):
    """A language model: learned positions, a stack of blocks, an untied head."""

    size: Size
    dtype: Dtype | None = None
    scanned: bool = False
    remat: bool = False
    wide: bool = False
    """Whether positions and head are float32 in the twin, too, as in many public models."""
    fields: tuple[tuple[str, Any], ...] = ()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size, dtype = self.size, self.dtype
        ends = None if self.wide else dtype
        x = nn.Embed(size.vocab, size.width, dtype=dtype)(tokens)
        positions = nn.Embed(size.length, size.width, dtype=ends, name="positions")
        x = x + positions(jnp.arange(tokens.shape[1]))
        fields = {"size": size, "dtype": dtype, **dict(self.fields)}
        x = stack(Block, size.depth, self.scanned, self.remat, x, **fields)
        return nn.Dense(size.vocab, dtype=ends, name="head")(nn.LayerNorm(dtype=dtype)(x))


class ViT(nn.Module):
    """A vision transformer (arXiv 2010.11929), pooled by the mean."""

    size: Size
    dtype: Dtype | None = None
    scanned: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, dtype = self.size, self.dtype
        patch = (size.side // 8 or 1,) * 2 if size.side > 8 else (2, 2)
        x = nn.Conv(size.width, patch, patch, padding="VALID", dtype=dtype)(images)
        x = x.reshape(x.shape[0], -1, size.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        fields = {"size": size, "dtype": dtype, "causal": False}
        x = stack(Block, size.depth, self.scanned, False, x, **fields)
        x = nn.LayerNorm(dtype=dtype)(x).mean(axis=1)
        return nn.Dense(size.classes, dtype=dtype)(x)


def rotary(x: jax.Array) -> jax.Array:
    """Rotary position embedding of [B, T, H, D] (arXiv 2104.09864), angles in float32."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class GemmaBlock(nn.Module):
    """RMSNorm, rotary attention, a gated MLP (arXiv 2403.08295)."""

    size: Size
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        size, dtype = self.size, self.dtype
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=dtype)
        y = nn.RMSNorm(dtype=dtype)(x)
        q, k, v = (dense((size.heads, size.width // size.heads))(y) for _ in range(3))
        y = jax.nn.dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + dense(size.width, axis=(-2, -1))(y)
        y = nn.RMSNorm(dtype=dtype)(x)
        y = nn.gelu(dense(4 * size.width)(y)) * dense(4 * size.width)(y)
        return x + dense(size.width)(y), None


class Gemma(nn.Module):
    """A Gemma-style decoder with a tied, soft-capped head."""

    size: Size
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        size, dtype = self.size, self.dtype
        embed = nn.Embed(
            size.vocab, size.width, dtype=dtype, embedding_init=nn.initializers.normal(0.02)
        )
        x = embed(tokens) * jnp.sqrt(size.width).astype(dtype or jnp.float32)
        x = stack(GemmaBlock, size.depth, False, False, x, size=size, dtype=dtype)
        logits = embed.attend(nn.RMSNorm(dtype=dtype)(x))
        return 30.0 * jnp.tanh(logits / 30.0)


# --- recurrent, convolutional and generative ---------------------------------------------------


class LSTM(nn.Module):
    """A language model of two LSTM layers."""

    size: Size
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.size.vocab, self.size.width, dtype=self.dtype)(tokens)
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(self.size.width, dtype=self.dtype))(x)
        return nn.Dense(self.size.vocab, dtype=self.dtype)(x)


class ResNet18(nn.Module):
    """ResNet-18 with BatchNorm (arXiv 1512.03385); a 3x3 stem for small images."""

    size: Size
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.BatchNorm, use_running_average=False, dtype=self.dtype)
        width = self.size.width // 8
        if self.size.side >= 64:
            x = nn.relu(norm()(conv(width, (7, 7), (2, 2))(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        else:
            x = nn.relu(norm()(conv(width, (3, 3))(x)))
        for stage in range(4):
            for block in range(2):
                strides = (2, 2) if stage and not block else (1, 1)
                channels, y = width * 2**stage, x
                y = nn.relu(norm()(conv(channels, (3, 3), strides)(y)))
                y = norm(scale_init=nn.initializers.zeros)(conv(channels, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(channels, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.size.classes, dtype=self.dtype)(x.mean(axis=(1, 2)))


class VAE(nn.Module):
    """A variational autoencoder of dense layers (arXiv 1312.6114); returns its loss."""

    size: Size
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        x = images.reshape(images.shape[0], -1)
        hidden = nn.relu(dense(8 * self.size.width)(x))
        mean, log_var = (dense(self.size.width)(hidden).astype(jnp.float32) for _ in range(2))
        noise = jax.random.normal(self.make_rng("dropout"), mean.shape)
        z = mean + jnp.exp(0.5 * log_var) * noise
        logits = dense(x.shape[-1])(nn.relu(dense(8 * self.size.width)(z))).astype(jnp.float32)
        bits = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        divergence = -0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var), -1)
        return jnp.mean(bits + divergence) / x.shape[-1]


# --- NNX ----------------------------------------------------------------------------------------


class CNN(nnx.Module):
    """The small convolutional net of the NNX tutorial: two convolutions, each pooled."""

    def __init__(self, size: Size, dtype: Dtype | None, rngs: nnx.Rngs):
        width, pixels = size.width, (size.side // 4) ** 2
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), dtype=dtype, rngs=rngs)
        self.conv1, self.conv2 = conv(size.channels, width // 2), conv(width // 2, width)
        self.linear1 = nnx.Linear(pixels * width, 4 * width, dtype=dtype, rngs=rngs)
        self.linear2 = nnx.Linear(4 * width, size.classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


class EncoderBlock(nnx.Module):
    """A pre-norm encoder block."""

    def __init__(self, size: Size, dtype: Dtype | None, rngs: nnx.Rngs):
        width = size.width
        self.norm1, self.norm2 = (nnx.LayerNorm(width, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            size.heads, width, dtype=dtype, decode=False, rngs=rngs
        )
        self.linear1 = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.linear2 = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x))))


class Encoder(nnx.Module):
    """A transformer encoder that labels every token with the next one, in NNX."""

    def __init__(self, size: Size, dtype: Dtype | None, rngs: nnx.Rngs):
        self.embed = nnx.Embed(size.vocab, size.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([EncoderBlock(size, dtype, rngs) for _ in range(size.depth)])
        self.norm = nnx.LayerNorm(size.width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(size.width, size.vocab, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def nnx_model(cls: Callable, size: Size, dtype: Dtype | None, kind: str) -> Model:
    """An NNX module of tokens or images that returns logits."""
    make = lambda key: cls(size, dtype, nnx.Rngs(params=key))
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def loss(params: Any, state: Any, batch: dict, key: Any) -> tuple[jax.Array, Any]:
        module = nnx.merge(graph, params)
        if kind == "text":
            return token_loss(module(batch["tokens"][:, :-1]), batch["tokens"]), state
        return label_loss(module(batch["images"]), batch["labels"]), state

    return Model(lambda key: (nnx.state(make(key)), {}), loss)


# --- other people's -----------------------------------------------------------------------------


def equinox_mlp(size: Size, dtype: Dtype | None) -> Model:
    """An Equinox MLP. Equinox has no `dtype=`: the twin casts parameters and inputs up front."""
    import equinox as eqx

    inputs = size.side**2 * size.channels
    make = lambda key: eqx.nn.MLP(inputs, size.classes, 4 * size.width, 4, key=key)
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    static = eqx.filter(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct), inverse=True)

    def loss(params: Any, state: Any, batch: dict, key: Any) -> tuple[jax.Array, Any]:
        x = batch["images"].reshape(-1, inputs)
        if dtype is not None:
            params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
        return label_loss(jax.vmap(eqx.combine(params, static))(x), batch["labels"]), state

    return Model(lambda key: (eqx.filter(make(key), eqx.is_array), {}), loss)


def jax_resnet_18(size: Size, dtype: Dtype | None) -> Model:
    """ResNet-18 of the package jax-resnet."""
    import jax_resnet

    module = jax_resnet.ResNet18(
        n_classes=size.classes,
        conv_cls=functools.partial(nn.Conv, dtype=dtype),
        norm_cls=functools.partial(nn.BatchNorm, momentum=0.9, dtype=dtype),
    )
    return linen_model(module, size, "images")


def transformers_gpt2(size: Size, dtype: Dtype | None) -> Model:
    """GPT-2 of Hugging Face's transformers (the last releases with Flax: 4.x), no dropout."""
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModule

    config = GPT2Config(
        vocab_size=size.vocab,
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.depth,
        n_head=size.heads,
        use_cache=False,
    )
    module = FlaxGPT2LMHeadModule(config, dtype=dtype or jnp.float32)

    def inputs(tokens: jax.Array) -> tuple:
        positions = jnp.broadcast_to(jnp.arange(size.length), tokens.shape)
        return tokens, jnp.ones_like(tokens), positions

    def loss(params: Any, state: Any, batch: dict, key: Any) -> tuple[jax.Array, Any]:
        tokens = inputs(batch["tokens"][:, :-1])
        (logits, *_) = module.apply({"params": params}, *tokens, return_dict=False)
        return token_loss(logits, batch["tokens"]), state

    def init(key: Any) -> tuple[Any, Any]:
        tokens = jnp.zeros((1, size.length), jnp.int32)
        return module.init(key, *inputs(tokens), return_dict=False)["params"], {}

    return Model(init, loss)


def _linen(cls: Any, kind: str, fields: tuple = (), **options: Any) -> Entry:
    options = {**options, "fields": fields} if fields else options

    def build(size: Size, dtype: Dtype | None) -> Model:
        return linen_model(cls(size, dtype, **options), size, kind)

    return Entry(kind, build)


def _nnx(cls: Any, kind: str) -> Entry:
    return Entry(kind, lambda size, dtype: nnx_model(cls, size, dtype, kind))


ZOO: dict[str, Entry] = {
    "decoder": _linen(Transformer, "text", (("dropout", 0.1),)),
    "decoder-scan-remat": _linen(Transformer, "text", scanned=True, remat=True),
    "decoder-wide": _linen(Transformer, "text", (("dropout", 0.1),), wide=True),
    "decoder-wide-scan-remat": _linen(Transformer, "text", scanned=True, remat=True, wide=True),
    "pre-ln-scan": _linen(Transformer, "text", scanned=True),
    "post-ln-scan": _linen(Transformer, "text", (("post", True),), scanned=True),
    "gemma": _linen(Gemma, "text"),
    "lstm": _linen(LSTM, "text"),
    "encoder-nnx": _nnx(Encoder, "text"),
    "vit": _linen(ViT, "images"),
    "vit-scan": _linen(ViT, "images", scanned=True),
    "resnet18": _linen(ResNet18, "images"),
    "cnn-nnx": _nnx(CNN, "images"),
    "vae": _linen(VAE, "images"),
    "mlp-equinox": Entry("images", equinox_mlp, "equinox"),
    "resnet18-jax-resnet": Entry("images", jax_resnet_18, "jax_resnet"),
    "gpt2-transformers": Entry("text", transformers_gpt2, "transformers"),
}
