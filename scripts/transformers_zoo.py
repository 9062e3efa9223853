"""The Flax models of Hugging Face's transformers, as `autocast_zoo.py` wants them: other people's code.

`ZOO["transformers/bert"].build(size, dtype)` and so on, of the last releases with Flax (4.x). All are
trained, with the dropout of their configs; masked models too predict the next token, and what is not
text is noise.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import autocast_zoo as zoo
import jax
import jax.numpy as jnp
import optax


def names_of(size: zoo.Size) -> dict[str, int]:
    """A size in all the words that configs have for it; each reads its own, and keeps the others."""
    words = (
        (size.vocab, "vocab_size"),
        (size.width, "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim"),
        (size.width, "projection_dim"),
        (4 * size.width, "intermediate_size ffn_dim d_ff hidden_dim"),
        (4 * size.width, "encoder_ffn_dim decoder_ffn_dim"),
        (size.depth, "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers"),
        (size.heads, "num_attention_heads num_heads n_head n_heads attention_heads"),
        (size.heads, "encoder_attention_heads decoder_attention_heads num_key_value_heads"),
        (size.width // size.heads, "head_dim d_kv rotary_dim"),
        (2 * size.length + 8, "max_position_embeddings n_positions max_target_positions"),
        (size.length // 2, "max_source_positions"),
        (size.side, "image_size"),
        (max(size.side // 16, 1), "patch_size"),
        (size.classes, "num_labels"),
    )
    return {word: number for number, line in words for word in line.split()}


def stages_of(size: zoo.Size) -> dict[str, Any]:
    """What a ResNet or RegNet has instead of a width and a depth."""
    widths = [size.width // 8 * 2**i for i in range(4)]
    return {"embedding_size": widths[0], "hidden_sizes": widths, "depths": [2] * 4}


# --- what each kind eats, and its loss ----------------------------------------------------------


def decoder_loss(call: Callable, batch: dict) -> jax.Array:
    """Of the next token, by a model of tokens alone."""
    return zoo.token_loss(call(batch["tokens"][:, :-1]).logits, batch["tokens"])


def translation_loss(call: Callable, batch: dict) -> jax.Array:
    """Of the next token, by a decoder that sees an encoding of the text in reverse."""
    tokens = batch["tokens"]
    logits = call(tokens[:, :0:-1], decoder_input_ids=tokens[:, :-1]).logits
    return zoo.token_loss(logits, tokens)


def transcription_loss(call: Callable, batch: dict) -> jax.Array:
    """Of the next token, by a decoder that sees an encoding of a spectrogram."""
    tokens = batch["tokens"]
    logits = call(batch["spectrograms"], decoder_input_ids=tokens[:, :-1]).logits
    return zoo.token_loss(logits, tokens)


def alignment_loss(call: Callable, batch: dict) -> jax.Array:
    """Connectionist temporal classification of a quarter of the tokens in a wave."""
    logits = call(batch["waves"]).logits.astype(jnp.float32)
    labels = batch["tokens"][:, : logits.shape[1] // 4]
    none = jnp.zeros(logits.shape[:2])
    return optax.ctc_loss(logits, none, labels, jnp.zeros(labels.shape)).mean()


def coloured(images: Any) -> jax.Array:
    """Images of three channels, which come first in this package."""
    return jnp.moveaxis(jnp.broadcast_to(images, (*images.shape[:3], 3)), 3, 1)


def image_loss(call: Callable, batch: dict) -> jax.Array:
    """Of an image's class."""
    return zoo.label_loss(call(coloured(batch["images"])).logits, batch["labels"])


def contrastive_loss(call: Callable, batch: dict) -> jax.Array:
    """Of which text belongs to which image."""
    outputs = call(batch["tokens"][:, :-1], coloured(batch["images"]))
    logits = outputs.logits_per_image.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits))).mean()


# --- models -------------------------------------------------------------------------------------


def old_clip() -> Any:
    """A context in which `jnp.clip` knows `a_max`, as in the JAX that T5 was written for."""
    new = jnp.clip

    def clip(x: Any, *bounds: Any, a_max: Any = None, **named: Any) -> jax.Array:
        return new(x, *bounds, **named) if a_max is None else new(x, *bounds, max=a_max)

    return mock.patch.object(jnp, "clip", clip)


def build(
    module: str,
    cls: str,
    loss_of: Callable,
    size: zoo.Size,
    dtype: Any,
    settings: Callable[[zoo.Size], dict],
) -> zoo.Model:
    """A model of the package, with initial parameters from its own code, and some more settings."""
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_flax_{module}")
    model_class = getattr(modeling, f"Flax{cls}")
    config = model_class.config_class(**{**names_of(size), **settings(size)})
    with old_clip():
        model = model_class(config, _do_init=False, dtype=dtype or jnp.float32)

    @old_clip()
    def init(key: Any) -> tuple[Any, Any]:
        variables = dict(model.init_weights(key, model.input_shape))
        return (variables.pop("params"), variables) if "params" in variables else (variables, {})

    @old_clip()
    def loss(params: Any, state: Any, batch: dict, key: Any) -> tuple[jax.Array, Any]:
        new: dict[str, Any] = {}

        def call(*inputs: Any, **options: Any) -> Any:
            options |= {"deterministic": False} if module == "opt" else {"train": True}
            if state:  # running statistics
                outputs, found = model(*inputs, params={"params": params, **state}, **options)
                new.update(found)
                return outputs
            return model(*inputs, params=params, dropout_rng=key, **options)

        return loss_of(call, batch), new

    return zoo.Model(init, loss)


def _entry(
    kind: str,
    loss_of: Callable,
    module: str,
    cls: str,
    settings: Callable[[zoo.Size], dict] = lambda _: {},
) -> zoo.Entry:
    make = functools.partial(build, module, cls, loss_of, settings=settings)
    return zoo.Entry(kind, make, "transformers")


text = functools.partial(_entry, "text", decoder_loss)
translation = functools.partial(_entry, "text", translation_loss)
image = functools.partial(_entry, "images", image_loss)


def _norms_of_waves(_: zoo.Size) -> dict[str, Any]:
    return {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def _clip_settings(size: zoo.Size) -> dict[str, Any]:
    return {"text_config": names_of(size), "vision_config": names_of(size)}


_MODELS: dict[str, zoo.Entry] = {
    "bert": text("bert", "BertForMaskedLM"),
    "roberta": text("roberta", "RobertaForMaskedLM"),
    "roberta-prenorm": text("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM"),
    "albert": text("albert", "AlbertForMaskedLM"),
    "electra": text("electra", "ElectraForMaskedLM"),
    "distilbert": text("distilbert", "DistilBertForMaskedLM"),
    "roformer": text("roformer", "RoFormerForMaskedLM"),
    "bigbird": text(
        "big_bird", "BigBirdForMaskedLM", lambda _: {"attention_type": "original_full"}
    ),
    "gpt2": text("gpt2", "GPT2LMHeadModel"),
    "gpt-neo": text(
        "gpt_neo",
        "GPTNeoForCausalLM",
        lambda size: {"attention_types": [[["global", "local"], size.depth // 2]]},
    ),
    "gpt-j": text("gptj", "GPTJForCausalLM"),
    "opt": text("opt", "OPTForCausalLM"),
    "xglm": text("xglm", "XGLMForCausalLM"),
    "bloom": text("bloom", "BloomForCausalLM"),
    "llama": text("llama", "LlamaForCausalLM"),
    "mistral": text("mistral", "MistralForCausalLM"),
    "gemma": text("gemma", "GemmaForCausalLM"),
    "t5": translation("t5", "T5ForConditionalGeneration"),
    "t5-gated": translation(
        "t5", "T5ForConditionalGeneration", lambda _: {"feed_forward_proj": "gated-gelu"}
    ),
    "longt5": translation("longt5", "LongT5ForConditionalGeneration"),
    "bart": translation("bart", "BartForConditionalGeneration"),
    "mbart": translation("mbart", "MBartForConditionalGeneration"),
    "pegasus": translation("pegasus", "PegasusForConditionalGeneration"),
    "marian": translation("marian", "MarianMTModel"),
    "blenderbot": translation("blenderbot", "BlenderbotForConditionalGeneration"),
    "whisper": _entry("speech", transcription_loss, "whisper", "WhisperForConditionalGeneration"),
    "wav2vec2": _entry("speech", alignment_loss, "wav2vec2", "Wav2Vec2ForCTC", _norms_of_waves),
    "vit": image("vit", "ViTForImageClassification"),
    "beit": image("beit", "BeitForImageClassification"),
    "dinov2": image("dinov2", "Dinov2ForImageClassification"),
    "resnet": image("resnet", "ResNetForImageClassification", stages_of),
    "regnet": image("regnet", "RegNetForImageClassification", stages_of),
    "clip": _entry("captions", contrastive_loss, "clip", "CLIPModel", _clip_settings),
}

ZOO = {f"transformers/{name}": entry for name, entry in _MODELS.items()}
