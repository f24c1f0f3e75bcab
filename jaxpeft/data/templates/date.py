"""The fixed date that chat templates are given.

Templates that write today's date would change the data daily. They are given 26 July 2024,
midnight, which is Llama 3's own fallback, in English and without a timezone.
"""

import re

_VALUES = {
    "a": "Fri",
    "A": "Friday",
    "b": "Jul",
    "B": "July",
    "c": "Fri Jul 26 00:00:00 2024",
    "C": "20",
    "d": "26",
    "D": "07/26/24",
    "e": "26",
    "f": "000000",
    "F": "2024-07-26",
    "g": "24",
    "G": "2024",
    "h": "Jul",
    "H": "00",
    "I": "12",
    "j": "208",
    "k": " 0",
    "l": "12",
    "m": "07",
    "M": "00",
    "n": "\n",
    "p": "AM",
    "P": "am",
    "r": "12:00:00 AM",
    "R": "00:00",
    "s": "1721952000",
    "S": "00",
    "t": "\t",
    "T": "00:00:00",
    "u": "5",
    "U": "29",
    "V": "30",
    "w": "5",
    "W": "30",
    "x": "07/26/24",
    "X": "00:00:00",
    "y": "24",
    "Y": "2024",
    "z": "",
    "Z": "",
    "%": "%",
}
_DIRECTIVE = re.compile(r"%([-_0^#]?)([EO]?)([A-Za-z%])")


def strftime_now(format: str) -> str:
    """Formats the fixed date, as ``datetime.strftime`` does in the C locale.

    Args:
        format: Text with directives such as ``%d``; flags as in ``%-d`` are those of glibc.

    Returns:
        The text with every known directive replaced.
    """
    return _DIRECTIVE.sub(_replace, format)


def _replace(found: re.Match[str]) -> str:
    flag, _, letter = found.groups()
    value = _VALUES.get(letter)
    if value is None:
        return found.group()
    if flag == "-" and value.strip().isdigit():
        return value.strip().lstrip("0") or "0"
    if flag == "_" and value.isdigit():
        return value.lstrip("0").rjust(len(value)) if value.strip("0") else "0".rjust(len(value))
    if flag == "0":
        return value.replace(" ", "0") if value.strip().isdigit() else value
    if flag in ("^", "#"):
        return value.lower() if letter == "P" or (flag, letter) == ("#", "p") else value.upper()
    return value
