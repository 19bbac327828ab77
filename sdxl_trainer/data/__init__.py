"""From pictures and captions on disk to the batches of a training step."""
