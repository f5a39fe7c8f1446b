"""What the training recipes share: TrainingRun, losses, batches, latents, EMA and checkpoints."""
