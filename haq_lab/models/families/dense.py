"""The rows of the dense architectures."""

from __future__ import annotations

from haq_lab.models.families.family import Family, Group
from haq_lab.models.families.parts import FUSED_ATTENTION, FUSED_MLP, HEAD_NORMS, attention, gated_mlp

UNPUBLISHED = 0.8  # SmoothQuant's authors published no strength for these models, so they use Mistral's

LLAMA_GROUPS = (*attention("input_layernorm"), *gated_mlp())
GEMMA_GROUPS = (
    *attention("input_layernorm", gain_offset=1.0),
    *gated_mlp("pre_feedforward_layernorm", gain_offset=1.0),
)
GEMMA_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
CAUSAL = (("use_bidirectional_attention", (None, False)),)

RELU_MLP = Group("up", "fc1", ("fc2",))

OPT_POSITIONS = "model.decoder.embed_positions"

DENSE: tuple[Family, ...] = (
    Family(
        "opt",
        "model.decoder.layers",
        (
            *attention("self_attn_layer_norm", "out_proj"),
            Group("norm", "final_layer_norm", ("fc1",)),
            RELU_MLP,
        ),
        smoothquant_strength=0.5,
        requires=(
            ("do_layer_norm_before", (True,)),
            ("layer_norm_elementwise_affine", (True,)),
            ("activation_function", ("relu",)),
        ),
        learned_positions=OPT_POSITIONS,
    ),
    # OPT-350M normalises after the residual sum. Its norms also feed the residual, so nothing can be folded into
    # them. Norms without weights cannot take a factor either.
    Family(
        "opt",
        "model.decoder.layers",
        (*attention(None, "out_proj"), Group("norm", None, ("fc1",)), RELU_MLP),
        smoothquant_strength=0.5,
        requires=(("activation_function", ("relu",)),),
        learned_positions=OPT_POSITIONS,
    ),
    Family("llama", "model.layers", LLAMA_GROUPS, smoothquant_strength=0.85),
    Family("mistral", "model.layers", LLAMA_GROUPS, smoothquant_strength=0.8),
    Family("qwen2", "model.layers", LLAMA_GROUPS, UNPUBLISHED),
    Family("qwen3", "model.layers", LLAMA_GROUPS, UNPUBLISHED, head_norms=HEAD_NORMS),
    # Gemma has a norm before and one after each half. What follows the second norm is the residual sum.
    Family("gemma2", "model.layers", GEMMA_GROUPS, UNPUBLISHED, requires=CAUSAL, output_norms=GEMMA_OUTPUT_NORMS),
    Family(
        "gemma3_text",
        "model.layers",
        GEMMA_GROUPS,
        UNPUBLISHED,
        requires=CAUSAL,
        head_norms=HEAD_NORMS,
        output_norms=GEMMA_OUTPUT_NORMS,
    ),
    Family("phi3", "model.layers", (*FUSED_ATTENTION, *FUSED_MLP), UNPUBLISHED),
    # OLMo 2 normalises after each half. Linears read the residual stream itself, so nothing folds into their input.
    Family(
        "olmo2",
        "model.layers",
        (*attention(None), *gated_mlp(None)),
        UNPUBLISHED,
        head_norms=HEAD_NORMS,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    Family("smollm3", "model.layers", LLAMA_GROUPS, UNPUBLISHED),
    Family("granite", "model.layers", LLAMA_GROUPS, UNPUBLISHED),
    Family(
        "glm4",
        "model.layers",
        (*attention("input_layernorm"), *FUSED_MLP),
        UNPUBLISHED,
        output_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    # The activation between c_fc and c_proj is neither a product nor homogeneous, so nothing folds through it.
    Family(
        "starcoder2",
        "model.layers",
        (
            *attention("input_layernorm"),
            Group("norm", "post_attention_layernorm", ("mlp.c_fc",)),
            Group("up", None, ("mlp.c_proj",)),
        ),
        UNPUBLISHED,
    ),
    Family("stablelm", "model.layers", LLAMA_GROUPS, UNPUBLISHED, requires=(("use_parallel_residual", (False,)),)),
)
