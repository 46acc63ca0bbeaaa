"""Write quantised checkpoints layer by layer, resume interrupted runs, and load, verify and export checkpoints.

A checkpoint is a folder:

    manifest.json              SHA-256 of every file and tensor. Written last, so a folder that has it is complete
    config.json                the model's config, with the provenance in `quantization_config`
    rest.safetensors           tensors outside the layers, in the source's dtype
    layer-00000.safetensors    one decoder layer: int8 weights, float32 scales and norms, smoothing folded in
    tokenizer*, ...            the tokenizer's files
    README.md                  model card. Not listed in the manifest, because no loader reads it
    work/                      hidden states for resuming. Exists only while the checkpoint is written
"""
