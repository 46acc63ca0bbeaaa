"""The HAQ quantizer, and the prediction of quantization errors by which it chooses."""
