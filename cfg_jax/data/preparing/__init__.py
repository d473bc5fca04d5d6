"""Archives of images, turned into data sets that training reads."""
