"""Is this Python too old for the rest of the package? Asked before anything else is imported.

JetPack 4 has Python 3.6 as its python3, which would stop at the first newer name with a traceback. This file, and the
package's __init__, therefore keep to what Python 2.7 and 3.6 read: no f-strings, no annotations.
"""

import json
import sys

__all__ = ["OLDEST", "sentence", "stop"]

OLDEST = (3, 8)


def sentence(version=None, release="/etc/nv_tegra_release"):  # type: ignore[no-untyped-def]  # Python 2.7 reads this
    """Why this interpreter cannot run the package; None where it can. `release` names the system of a Jetson."""
    version = tuple(version or sys.version_info)[:2]
    if version >= OLDEST:
        return None
    found = "Python %d.%d was started, and 3.8 or newer is needed." % version
    try:
        with open(release) as file:
            l4t = file.readline()
    except (IOError, OSError):
        l4t = ""
    if l4t.startswith("# R32"):
        return (
            found + " This board runs JetPack 4 (L4T 32), whose python3 and TensorRT 8.2 are too old: "
            "JetPack 5 or newer is needed, which Xavier boards can be flashed with, and Nano, TX1 and TX2 cannot."
        )
    return found + " Start run.pyz with a newer one, for instance: python3.8 run.pyz"


def stop(arguments):  # type: ignore[no-untyped-def]
    """Prints the sentence, with --json as the one JSON document on standard output, and returns the exit code 3."""
    text = sentence()  # type: ignore[no-untyped-call]
    if "--json" in arguments:
        print(json.dumps({"schema": 1, "error": text, "class": "VersionFailure", "exit_code": 3}, indent=1))
    else:
        sys.stderr.write("Error: %s\n" % text)
    return 3
