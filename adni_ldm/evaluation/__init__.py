"""What the samples are worth."""
