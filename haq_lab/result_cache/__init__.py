"""The result cache: store the results of a run, so that other runs with the same inputs need not compute them again."""
