"""Many trials: search dimensions, populations, the two engines, the run directory, and `sweep` itself."""
