"""Offloading policies: placement, eviction rules and prefetching."""
