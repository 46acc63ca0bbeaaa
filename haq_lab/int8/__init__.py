"""Int8 arithmetic: its definition, int8 linears, and backends whose int32 sums are bit-identical."""
