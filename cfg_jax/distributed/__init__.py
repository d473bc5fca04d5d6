"""Several processes that make one job."""
