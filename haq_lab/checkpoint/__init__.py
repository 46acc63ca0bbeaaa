"""Quantised checkpoints: written a layer at a time, resumed where they were killed, read straight into int8 modules.

A checkpoint is a folder:

    manifest.json              written last: a folder that has one is whole. SHA-256 of every file and every tensor
    config.json                the model's config, and under `quantization_config` where the weights come from
    rest.safetensors           what is not quantised and lies outside the layers, in the source's own dtype
    layer-00000.safetensors    a decoder layer: int8 levels, float32 scales and norms, smoothing folded in
    tokenizer*, ...            the tokenizer's files
    work/                      only while it is being written: hidden states, for going on after a kill
"""
