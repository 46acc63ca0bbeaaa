"""INT8 arithmetic: one contract, several backends that agree bit for bit in int32."""
