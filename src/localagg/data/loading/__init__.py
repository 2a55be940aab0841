"""Order, batches and worker processes."""
