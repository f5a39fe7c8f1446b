"""The classes of a data set, as every command asks for them."""

from __future__ import annotations

from adni_ldm.errors import UserError

CLASSES_HELP = "Classes by the names of their folders, in the order of their labels: AD,NC or AD,MCI,NC."
TABLE_HELP = "The archive's study table (CSV), for files named by image ID: the person in it is the subject."


def class_names(classes: str) -> tuple[str, ...]:
    """("AD", "NC") of "AD,NC", and of "AD,CN", which is the archive's word for the same.

    Raises:
        UserError: fewer than two, or one twice.
    """
    names = tuple({"CN": "NC"}.get(name.strip(), name.strip()) for name in classes.split(","))
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise UserError(f"--classes {classes}: give two or more different ones, such as AD,NC or AD,MCI,NC")
    return names
