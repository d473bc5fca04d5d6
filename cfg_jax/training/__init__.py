"""The parts of a training run: the step, the optimizer, the state, its checkpoints and logs."""
