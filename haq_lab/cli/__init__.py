"""Commands: parse the arguments, call the other packages and print errors that the user can correct."""
