"""Models: where they come from, what their layers are called, and how they are read a layer at a time."""
