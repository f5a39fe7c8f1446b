"""What the training recipes share: losses, batches, latents, checkpoints and the run's log."""
