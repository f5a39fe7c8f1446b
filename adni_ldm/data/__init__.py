"""Slices to tensors: data folders, splits, study table, manifest, provenance, QC, duplicates."""
