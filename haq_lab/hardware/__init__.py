"""Machines by name: published specifications, and the measured profile of this machine."""
