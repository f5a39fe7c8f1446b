"""Slices, how they are split, and a cohort made of nothing but a template."""
