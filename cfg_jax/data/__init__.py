"""Where images and labels come from, and how they reach a training step."""
