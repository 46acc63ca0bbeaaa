"""Offload experts to a slower memory tier: policies, the engine, the tiers, cost models and a simulator."""
