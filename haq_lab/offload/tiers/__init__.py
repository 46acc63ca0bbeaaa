"""Store experts in a slow tier (disk or host memory) and in the slots of a fast tier."""
