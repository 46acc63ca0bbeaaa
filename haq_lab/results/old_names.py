"""Names that a run folder of an older version uses, and their present names.

`load` and the report translate them, so that runs of all versions share one table.
"""

from __future__ import annotations

SETTINGS = {
    "stages.use": "result_cache.enabled",
    "stages.dir": "result_cache.dir",
    "stages.limit": "result_cache.max_size",
    "quantizer.strength": "quantizer.smoothing_strength",
    "quantizer.damp": "quantizer.dampening_frac",
    "quantizer.head": "quantizer.lm_head",
    "quantizer.asymmetric": "quantizer.asymmetric_calibration",
    "offload.miss": "offload.on_miss",
    "offload.cache": "offload.eviction",
    "objective": "search_metric",
    "calibration.propagate": "calibration.inputs",
}
LAYER_COLUMNS = {"strength": "smoothing_strength", "scheme": "activation_scheme", "error": "output_error"}
