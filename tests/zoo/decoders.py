"""Causal language models."""

from zoo.base import DECODER, ENCODER, SPECIAL, Tiny, table

HEAD_DIM = {**DECODER, **SPECIAL, "head_dim": 12}
PLAIN = {**DECODER, **SPECIAL}
_GPT2 = {
    "vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 44, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_OPT = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 44,
    "max_position_embeddings": 40,
}  # fmt: skip
_GEMMA = {**HEAD_DIM, "sliding_window": 8, "query_pre_attn_scalar": 12}
_MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_FALCON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 44,
    "max_position_embeddings": 40, **SPECIAL,
}  # fmt: skip
_LATENT = {
    **ENCODER, **SPECIAL, "num_key_value_heads": 4, "q_lora_rank": 14, "kv_lora_rank": 18, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 20, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip

DECODERS = table(
    Tiny("gpt2", "GPT2LMHeadModel", _GPT2),
    Tiny("gpt_neox", "GPTNeoXForCausalLM", ENCODER),
    Tiny("opt", "OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 24}),
    Tiny("opt_post_norm", "OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    Tiny("bloom", "BloomForCausalLM", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Tiny("llama", "LlamaForCausalLM", DECODER),
    Tiny("llama_mha", "LlamaForCausalLM", {**DECODER, "num_key_value_heads": 4}),
    Tiny("llama_mqa", "LlamaForCausalLM", {**DECODER, "num_key_value_heads": 1}),
    Tiny("mistral", "MistralForCausalLM", {**PLAIN, "sliding_window": 8}),
    Tiny("qwen2", "Qwen2ForCausalLM", PLAIN),
    Tiny("qwen3", "Qwen3ForCausalLM", HEAD_DIM),
    Tiny("gemma2", "Gemma2ForCausalLM", _GEMMA),
    Tiny("gemma3", "Gemma3ForCausalLM", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    Tiny("phi3", "Phi3ForCausalLM", PLAIN),
    Tiny("mixtral", "MixtralForCausalLM", {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}),
    Tiny("qwen3_moe", "Qwen3MoeForCausalLM", {**HEAD_DIM, **_MOE}),
)  # fmt: skip

DECODER_VARIANTS = table(
    Tiny("gpt2_base", "GPT2Model", _GPT2),
    Tiny("gpt2_classify", "GPT2ForSequenceClassification", {**_GPT2, "num_labels": 3, "pad_token_id": 0}),
    Tiny("gpt2_tokens", "GPT2ForTokenClassification", {**_GPT2, "num_labels": 3}),
    Tiny("gpt2_qa", "GPT2ForQuestionAnswering", _GPT2),
    Tiny("gpt2_three_layers", "GPT2LMHeadModel", {**_GPT2, "n_layer": 3}),
    Tiny("llama_base", "LlamaModel", DECODER),
    Tiny("llama_classify", "LlamaForSequenceClassification", {**PLAIN, "num_labels": 3}),
    Tiny("llama_tokens", "LlamaForTokenClassification", {**PLAIN, "num_labels": 3}),
    Tiny("llama_qa", "LlamaForQuestionAnswering", PLAIN),
    Tiny("llama_biases", "LlamaForCausalLM", {
        **PLAIN, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12,
    }),
    Tiny("gpt_neox_sequential", "GPTNeoXForCausalLM", {**ENCODER, "use_parallel_residual": False}),
    Tiny("opt_plain", "OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 32}),
    Tiny("qwen2_classify", "Qwen2ForSequenceClassification", {**PLAIN, "num_labels": 3}),
    Tiny("mixtral_eager_experts", "MixtralForCausalLM", {
        **DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager",
    }),
    Tiny("qwen3_moe_eager_experts", "Qwen3MoeForCausalLM", {**HEAD_DIM, **_MOE, "experts_implementation": "eager"}),
)  # fmt: skip

OTHER_DECODERS = table(
    Tiny("apertus", "ApertusForCausalLM", PLAIN),
    Tiny("arcee", "ArceeForCausalLM", HEAD_DIM),
    Tiny("bamba", "BambaForCausalLM", {
        **PLAIN, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1, "mamba_expand": 2,
        "mamba_chunk_size": 4, "attn_layer_indices": [1],
    }),
    Tiny("biogpt", "BioGptForCausalLM", ENCODER),
    Tiny("bitnet", "BitNetForCausalLM", PLAIN),
    Tiny("codegen", "CodeGenForCausalLM", {**_GPT2, "rotary_dim": 4}),
    Tiny("cohere", "CohereForCausalLM", {**PLAIN, "use_qk_norm": True}),
    Tiny("cohere2", "Cohere2ForCausalLM", {**HEAD_DIM, "sliding_window": 8}),
    Tiny("ctrl", "CTRLLMHeadModel", {
        "vocab_size": 97, "n_positions": 40, "n_embd": 32, "dff": 44, "n_layer": 2, "n_head": 4,
    }),
    Tiny("dbrx", "DbrxForCausalLM", {
        "vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 32},
    }),
    Tiny("deepseek_v2", "DeepseekV2ForCausalLM", {**_LATENT, "topk_method": "group_limited_greedy"}),
    Tiny("deepseek_v3", "DeepseekV3ForCausalLM", _LATENT),
    Tiny("diffllama", "DiffLlamaForCausalLM", {**PLAIN, "num_key_value_heads": 4}),
    Tiny("doge", "DogeForCausalLM", PLAIN),
    Tiny("dots1", "Dots1ForCausalLM", {
        **HEAD_DIM, "moe_intermediate_size": 20, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "sliding_window": 8,
    }),
    Tiny("ernie4_5", "Ernie4_5ForCausalLM", HEAD_DIM),
    Tiny("exaone4", "Exaone4ForCausalLM", {**PLAIN, "sliding_window": 8, "sliding_window_pattern": 2}),
    Tiny("falcon_mqa", "FalconForCausalLM", {**_FALCON, "multi_query": True, "new_decoder_architecture": False}),
    Tiny("falcon_new", "FalconForCausalLM", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    Tiny("falcon_alibi", "FalconForCausalLM", {
        **_FALCON, "multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True,
        "parallel_attn": False,
    }),
    Tiny("falcon_h1", "FalconH1ForCausalLM", {
        **HEAD_DIM, "mamba_d_ssm": 40, "mamba_n_heads": 5, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1,
        "mamba_chunk_size": 4,
    }),
    Tiny("falcon_mamba", "FalconMambaForCausalLM", {
        "vocab_size": 97, "hidden_size": 32, "state_size": 6, "num_hidden_layers": 2, "time_step_rank": 5,
    }),
    Tiny("gemma", "GemmaForCausalLM", HEAD_DIM),
    Tiny("glm", "GlmForCausalLM", HEAD_DIM),
    Tiny("glm4", "Glm4ForCausalLM", HEAD_DIM),
    Tiny("glm4_moe", "Glm4MoeForCausalLM", {
        **HEAD_DIM, "moe_intermediate_size": 20, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    }),
    Tiny("gpt_bigcode", "GPTBigCodeForCausalLM", {**_GPT2, "multi_query": True}),
    Tiny("gpt_bigcode_mha", "GPTBigCodeForCausalLM", {**_GPT2, "multi_query": False}),
    Tiny("gpt_neo", "GPTNeoForCausalLM", {
        "vocab_size": 97, "max_position_embeddings": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "intermediate_size": 44, "window_size": 5,
    }),
    Tiny("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", {**ENCODER, "intermediate_multiple_size": 2}),
    Tiny("gpt_oss", "GptOssForCausalLM", {
        **HEAD_DIM, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8,
    }),
    Tiny("gptj", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    Tiny("granite", "GraniteForCausalLM", PLAIN),
    Tiny("granitemoe", "GraniteMoeForCausalLM", {**PLAIN, "num_local_experts": 3, "num_experts_per_tok": 2}),
    Tiny("helium", "HeliumForCausalLM", {**PLAIN, "head_dim": 8}),
    Tiny("hunyuan", "HunYuanDenseV1ForCausalLM", HEAD_DIM),
    Tiny("imagegpt", "ImageGPTForCausalImageModeling", _GPT2),
    Tiny("jamba", "JambaForCausalLM", {
        **PLAIN, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 3, "num_experts_per_tok": 2, "mamba_d_state": 6, "mamba_dt_rank": 5, "use_mamba_kernels": False,
    }),
    Tiny("jetmoe", "JetMoeForCausalLM", {
        **PLAIN, "kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 2,
    }),
    Tiny("lfm2", "Lfm2ForCausalLM", {**PLAIN, "layer_types": ["conv", "full_attention"], "block_multiple_of": 4}),
    Tiny("mamba", "MambaForCausalLM", {
        "vocab_size": 97, "hidden_size": 32, "state_size": 6, "num_hidden_layers": 2, "time_step_rank": 5,
    }),
    Tiny("mamba2", "Mamba2ForCausalLM", {
        "vocab_size": 97, "hidden_size": 32, "state_size": 6, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
        "n_groups": 2, "chunk_size": 4,
    }),
    Tiny("minimax", "MiniMaxForCausalLM", {
        **HEAD_DIM, "num_local_experts": 3, "num_experts_per_tok": 2, "block_size": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    Tiny("ministral", "MinistralForCausalLM", {**HEAD_DIM, "sliding_window": 8}),
    Tiny("modernbert_decoder", "ModernBertDecoderForCausalLM", {
        **ENCODER, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2,
        "local_attention": 8,
    }),
    Tiny("mpt", "MptForCausalLM", {
        "vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 40,
    }),
    Tiny("nemotron", "NemotronForCausalLM", HEAD_DIM),
    Tiny("olmo", "OlmoForCausalLM", PLAIN),
    Tiny("olmo2", "Olmo2ForCausalLM", PLAIN),
    Tiny("olmo3", "Olmo3ForCausalLM", {**PLAIN, "sliding_window": 8}),
    Tiny("olmoe", "OlmoeForCausalLM", {**PLAIN, "num_experts": 3, "num_experts_per_tok": 2}),
    Tiny("openai_gpt", "OpenAIGPTLMHeadModel", {
        "vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4,
    }),
    Tiny("persimmon", "PersimmonForCausalLM", {**ENCODER, **SPECIAL, "partial_rotary_factor": 0.5}),
    Tiny("phi", "PhiForCausalLM", {**PLAIN, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    Tiny("phimoe", "PhimoeForCausalLM", {**PLAIN, "num_local_experts": 3, "num_experts_per_tok": 2}),
    Tiny("qwen2_moe", "Qwen2MoeForCausalLM", {**PLAIN, **_MOE, "shared_expert_intermediate_size": 28}),
    Tiny("qwen3_next", "Qwen3NextForCausalLM", {
        **HEAD_DIM, **_MOE, "shared_expert_intermediate_size": 28, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    Tiny("recurrent_gemma", "RecurrentGemmaForCausalLM", {
        **PLAIN, "lru_width": 24, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
    }),
    Tiny("reformer", "ReformerModelWithLMHead", {
        "vocab_size": 97, "attention_head_size": 8, "attn_layers": ["local", "local"], "hidden_size": 32,
        "num_attention_heads": 4, "feed_forward_size": 44, "axial_pos_shape": [4, 10], "axial_pos_embds_dim": [12, 20],
        "max_position_embeddings": 40, "local_attn_chunk_length": 4, "is_decoder": True,
    }),
    Tiny("rwkv", "RwkvForCausalLM", {
        "vocab_size": 97, "context_length": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 44,
        "attention_hidden_size": 24,
    }),
    Tiny("seed_oss", "SeedOssForCausalLM", HEAD_DIM),
    Tiny("smollm3", "SmolLM3ForCausalLM", {**PLAIN, "no_rope_layers": [1, 0]}),
    Tiny("stablelm", "StableLmForCausalLM", {**PLAIN, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    Tiny("starcoder2", "Starcoder2ForCausalLM", PLAIN),
    Tiny("trocr", "TrOCRForCausalLM", {
        "vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 44,
        "max_position_embeddings": 40, "is_decoder": True,
    }),
    Tiny("xglm", "XGLMForCausalLM", {
        "vocab_size": 97, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 44,
        "max_position_embeddings": 40,
    }),
    Tiny("xlstm", "xLSTMForCausalLM", {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 4,
    }),
    Tiny("zamba2", "Zamba2ForCausalLM", {
        **PLAIN, "mamba_d_state": 6, "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_expand": 2, "n_mamba_heads": 8,
        "chunk_size": 4, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 3,
        "use_mem_rope": True,
    }),
)  # fmt: skip
