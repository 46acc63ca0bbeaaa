"""Map the names of older versions to the present ones.

`load` and the report translate old run folders, so that runs of all versions share one table. The command line refuses
an old setting and gives its new name.
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
    "tracking._target_": "tracking.NAME._target_",
    "tracking.mode": "tracking.offline.mode",
    "tracking.project": "tracking.offline.project",
}
LAYER_COLUMNS = {"strength": "smoothing_strength", "scheme": "activation_scheme", "error": "output_error"}
