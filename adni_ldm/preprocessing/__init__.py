"""From scans to slices: study tables, reading, registration, slicing, and the phantom cohort."""
