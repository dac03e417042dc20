"""Attributes of a HF config.json that change nothing, or nothing at the one value they are accepted with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Attributes that may stand in a config without changing what a forward pass computes: names and versions, storage,
# training (initializers, dropout), the returned Python objects, and defaults of sampling.
_NEUTRAL_NAMES = """
_name_or_path name_or_path transformers_version transformers.js_config unsloth_version unsloth_fixed
is_llama_config dtype torch_dtype torchscript use_bfloat16 tf_legacy_loss
attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled use_cache
pretraining_tp initializer_range attention_dropout hidden_dropout gradient_checkpointing
output_attentions output_hidden_states output_scores return_dict return_dict_in_generate keys_to_ignore_at_inference
id2label label2id num_labels problem_type finetuning_task task_specific_params prefix is_decoder
tie_encoder_decoder chunk_size_feed_forward pad_token_id unk_token_id sep_token_id decoder_start_token_id
max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
"""
NEUTRAL = frozenset(_NEUTRAL_NAMES.split())

# Attributes that are understood only at the value that changes nothing.
FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (1,),
        "rope_interleaved": (False,),
        "use_mrope": (False,),
        "use_qk_norm": (False,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({}, []),
        "no_rope_layers": ([],),
        "auto_map": ({},),
        "num_experts": (0,),
        "num_local_experts": (0,),
    }
)
