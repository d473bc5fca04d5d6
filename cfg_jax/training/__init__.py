"""What a training run is made of: the step, the optimizer, the state, its checkpoints."""
