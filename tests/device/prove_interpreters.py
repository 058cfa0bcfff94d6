"""`make interpreters`: a real bundle under every CPython 3.8 to 3.13 of this machine, with a runtime it has wheels of.

Each gets a virtual environment in the cache folder, with these pins and nothing they depend on: numpy and ONNX Runtime
are all that a bundle needs. BUNDLE=FOLDER takes another bundle than the one it makes, RECORD=FILE writes what was seen.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdedge_device.record import now

from .interpreters import SUPPORTED, found
from .road import Wrong, cache, compare, make_bundle, run_pyz, say, walk

__all__ = ["main"]

# The last that have wheels for it (3.8 to 3.10), or a recent one: numpy, ONNX Runtime, Pillow.
PINS = {
    "3.8": ("1.24.4", "1.19.2", "10.4.0"),
    "3.9": ("2.0.2", "1.19.2", "11.3.0"),
    "3.10": ("2.2.6", "1.23.2", "12.0.0"),
    "3.11": ("2.3.5", "1.23.2", "12.0.0"),
    "3.12": ("2.3.5", "1.23.2", "12.0.0"),
    "3.13": ("2.3.5", "1.23.2", "12.0.0"),
}


def main() -> int:
    started_at, bundle, interpreters = now(), make_bundle(), found()
    here = walk(run_pyz([sys.executable], bundle, dict(os.environ)), bundle)
    results: dict[str, Any] = {}
    for version in SUPPORTED:
        if version not in interpreters:
            say(f"{version}: not on this machine")
            continue
        try:
            there = walk(run_pyz([environment(version, interpreters[version])], bundle, clean()), bundle)
            results[version] = {"python": there["python"], **there["runtimes"], "artifacts": compare(here, there)}
        except Wrong as error:
            results[version] = {"wrong": str(error)}
        say(f"{version}: {results[version].get('wrong') or told(results[version])}")
    if os.environ.get("RECORD"):
        document = {
            "schema": 1,
            "what": "run.pyz under each CPython",
            "started_at": started_at,
            "pins": PINS,
            "interpreters": results,
        }
        Path(os.environ["RECORD"]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if not results or any("wrong" in each for each in results.values()) else 0


def told(result: dict[str, Any]) -> str:
    each = ", ".join(
        f"{name} differs by {one['golden_max_abs_difference']:.2g}, accuracy {one['accuracy_there']:.4f}"
        for name, one in result["artifacts"].items()
    )
    return f"Python {result['python']}, numpy {result['numpy']}, onnxruntime {result['onnxruntime']}: {each}"


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def environment(version: str, python: str) -> str:
    """The interpreter of a virtual environment with the pins; made once."""
    folder = cache("interpreters") / version
    pins = [f"{name}=={pin}" for name, pin in zip(("numpy", "onnxruntime", "pillow"), PINS[version], strict=True)]
    mark, inside = folder / "pins.json", str(folder / "bin" / "python")
    if not mark.is_file() or json.loads(mark.read_text()) != pins:
        say(f"{version}: installing {', '.join(pins)}")
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True, env=clean())
        install = ["-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        done = subprocess.run([inside, *install, *pins], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Wrong(f"pip could not install {', '.join(pins)}: {done.stderr.strip()[-500:]}")
        mark.write_text(json.dumps(pins))
    return inside


if __name__ == "__main__":
    sys.exit(main())
