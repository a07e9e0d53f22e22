"""Tokenizers of whole words for the closed vocabulary, and the tiny text encoders that read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..world import grammar_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
        T5EncoderModel,
        UMT5EncoderModel,
    )

T5_SPECIAL = ("<pad>", "</s>", "<unk>")
# CLIP takes its pooled output at the first end of sentence, except if that token has the number 2: then it takes the
# largest number of the sentence instead, as its first release did.
CLIP_SPECIAL = ("<pad>", "<s>", "<unk>", "</s>")
CLIP_LENGTH = 32  # pipelines pad to what the tokenizer says; the longest sentence has 30 tokens
UMT5_WIDTH = 64


def vocabulary(special: tuple[str, ...]) -> dict[str, int]:
    """Word to token number: the special tokens, then every word that the grammar can produce."""
    return {word: index for index, word in enumerate((*special, *grammar_words()))}


def build_t5_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Words and an end of sentence, for T5 and UMT5.

    Args:
        length: number of tokens that the pipeline pads to.
    """
    return _tokenizer(T5_SPECIAL, "$A </s>", length, eos_token="</s>")


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """Words between a beginning and an end of sentence, padded to ``CLIP_LENGTH`` by the pipelines."""
    return _tokenizer(CLIP_SPECIAL, "<s> $A </s>", CLIP_LENGTH, bos_token="<s>", eos_token="</s>")


def build_umt5_encoder() -> UMT5EncoderModel:
    """A UMT5 encoder of two layers, ``UMT5_WIDTH`` wide."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**_t5_sizes(UMT5_WIDTH)))


def build_t5_encoder(width: int) -> T5EncoderModel:
    """A T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_t5_sizes(width), feed_forward_proj="gated-gelu"))


def build_clip_encoder(width: int, layers: int) -> CLIPTextModel:
    """A CLIP text encoder; the pipeline reads its last layer."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(width, layers))


def build_clip_projection_encoder(width: int, layers: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with a pooled output as wide as its layers; the pipeline reads the last layer but one."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(width, layers))


def _tokenizer(special: tuple[str, ...], template: str, length: int, **names: str) -> PreTrainedTokenizerFast:
    from tokenizers import normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = vocabulary(special)
    tokenizer = _word_level(words)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, words[token]) for token in names.values()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=length, **names
    )


def _word_level(words: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel(words, unk_token="<unk>"))


def _t5_sizes(width: int) -> dict[str, object]:
    return {
        "vocab_size": len(vocabulary(T5_SPECIAL)),
        "d_model": width,
        "d_kv": width // 4,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 32,
        "dropout_rate": 0.0,
        "pad_token_id": T5_SPECIAL.index("<pad>"),
        "eos_token_id": T5_SPECIAL.index("</s>"),
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": True,
    }


def _clip_config(width: int, layers: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(vocabulary(CLIP_SPECIAL)),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=CLIP_LENGTH,
        pad_token_id=CLIP_SPECIAL.index("<pad>"),
        bos_token_id=CLIP_SPECIAL.index("<s>"),
        eos_token_id=CLIP_SPECIAL.index("</s>"),
    )
