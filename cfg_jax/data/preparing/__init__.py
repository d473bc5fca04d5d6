"""Read archives of images, one file a kind, and write data sets that training reads."""
