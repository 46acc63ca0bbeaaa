"""Generate text in a terminal: one answer, or a chat."""
