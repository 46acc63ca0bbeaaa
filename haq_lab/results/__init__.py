"""Load the results of runs as a table, and print or draw them."""
