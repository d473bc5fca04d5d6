"""The jobs, one file for each --mode of the command line; each is read from top to bottom."""
