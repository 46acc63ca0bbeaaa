"""Put a few fixed tokens, the prefix, before every sequence that a model reads.

A model's first token has activations that are thousands of times the usual ones, and a static scale must cover them. A
prefix takes them away from the text (PrefixQuant, arXiv 2410.05265). Only the prefix's keys and values are used. They
are computed once, in full precision.

The prefix is inserted in one place: the attention function (`attention`). It puts the keys and values, which are
buffers of the attention module, before those that the function receives. The alternative was to fill every KV cache
beforehand. Then every part that counts the positions in a cache would need to know about the prefix: `generate`, chats
that continue a cache, beams, sliding windows, padded batches and forwards without a cache. None of them has to, because
the prefix is never in a cache that transformers sees.

So the tokens keep their positions. The prefix has the negative positions before them (`positions`). Rotary embeddings
depend on differences of positions only, so this equals a shift of the tokens. A table of learned positions is shifted.
"""
