"""What can go wrong on a device, each with its exit code (a script on a board reads the code, a person the sentence).

    Failure              2  the user can fix it: a missing file, a bad image, a wrong argument
    ├── BudgetFailure    1  it ran, and a check did not hold
    ├── VersionFailure   3  a file of a newer schema, or a runtime of another version
    ├── DeviceFailure    4  built for another device
    ├── CorruptFailure   5  a file is damaged, altered or missing from the bundle
    └── RuntimeFailure   6  no driver, no runtime, or a package that is not installed

Python 3.8, standard library only.
"""

__all__ = [
    "BudgetFailure",
    "CorruptFailure",
    "DeviceFailure",
    "Failure",
    "RuntimeFailure",
    "VersionFailure",
]


class Failure(Exception):
    """Printed as a sentence, never as a traceback; the process exits with `exit_code`."""

    exit_code = 2


class BudgetFailure(Failure):
    exit_code = 1


class VersionFailure(Failure):
    exit_code = 3


class DeviceFailure(Failure):
    exit_code = 4


class CorruptFailure(Failure):
    exit_code = 5


class RuntimeFailure(Failure):
    exit_code = 6
