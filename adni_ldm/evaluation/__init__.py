"""Evaluation of generated slices against real slices of held-out subjects."""
