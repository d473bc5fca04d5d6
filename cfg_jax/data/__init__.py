"""The sources of images and labels, and the pipeline that carries them to a training step."""
