"""Experts on two tiers: routing traces, placement, caches, the policy that ties them, an engine and a simulator."""
