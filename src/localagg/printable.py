"""Text that foreign files bring along (names of images, columns and classes), made fit to print."""

import re

# Control characters, what turns the direction of writing, line ends of Unicode, and the surrogates
# that stand for bytes which are no text: Python would refuse to print those.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text in one line, without anything that a terminal would obey.

    Such characters become backslash escapes (``\n``, ``\x1b``), bytes that are no text too
    (``\xff``); all others stay, a backslash among them.
    """
    return _UNFIT.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as Python has it in names of files
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()
