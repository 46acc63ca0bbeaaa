"""The rows of the dense architectures."""

from __future__ import annotations

from haq_lab.models.families.family import Family, Group
from haq_lab.models.families.parts import GATED_MLP, attention

LLAMA_GROUPS = (*attention("input_layernorm", "o_proj"), *GATED_MLP)

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
)
