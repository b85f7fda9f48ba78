"""Exit codes of the `octet` commands, and the error of a wrong command line.

0 says that the command did what it is for. Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from ..errors import SettingsError

FAULT = 1  # the command ran, and found or met a fault
USED_WRONGLY = 2  # an argument or an option is wrong; nothing was done
INTERRUPTED = 130  # by Ctrl-C


class UsageError(SettingsError):
    """The command line is wrong; the message names the option, its value and what is allowed."""
