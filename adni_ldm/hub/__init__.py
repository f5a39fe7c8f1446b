"""Sharing models and drawn slices on the Hugging Face Hub: `python -m adni_ldm.hub --help`."""
