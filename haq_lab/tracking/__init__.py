"""Record runs: the run folder is the authoritative record, and trackers such as W&B receive a copy."""
