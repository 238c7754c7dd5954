"""One trial: batches in their order, the pure step, `fit`, its history, checkpoints and verdict."""
