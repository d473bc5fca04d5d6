"""One file a job: what each --mode of the command line does."""
