"""Push models and samples to the Hugging Face Hub: `python -m adni_ldm.hub --help`."""
