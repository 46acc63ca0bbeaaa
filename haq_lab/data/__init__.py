"""Data: real text -> token windows, with a stamp that says what a figure on them can be compared with."""
