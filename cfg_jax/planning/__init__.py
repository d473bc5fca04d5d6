"""Planning a training run: devices, compiled steps and their traffic."""
