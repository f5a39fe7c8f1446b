"""Text in the CSV files that we write: a spreadsheet takes a cell that begins with = + - @ for a formula.

Names of subjects, scans and classes come from studies and models of others. Such a cell gets an apostrophe
before it, as OWASP's page on CSV injection suggests, and our reading removes it. Numbers stay as they are,
and so does `file_name`, which other tools look up: it begins with a class, and none begins like this.
"""

import re

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def escape(value: object) -> object:
    """A value as a cell; what is no text, or is a number, is returned as it is."""
    risky = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if risky else value


def unescape(value: object) -> object:
    """The value that `escape` made a cell of."""
    return value[1:] if isinstance(value, str) and value[:1] == "'" and _FORMULA.match(value) else value


def escape_table(table: pd.DataFrame) -> pd.DataFrame:
    """A table with its texts escaped, but for `file_name`."""
    return _map(table, escape)


def unescape_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table that `escape_table` was given."""
    return _map(table, unescape)


def _map(table: pd.DataFrame, change) -> pd.DataFrame:
    texts = [name for name in table.select_dtypes(exclude="number") if name != "file_name"]
    return table.assign(**{name: table[name].map(change) for name in texts})
