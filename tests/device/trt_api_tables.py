"""Writes trt_api.json: what each TensorRT's Python bindings have, by name. Run once for a new TensorRT, by hand.

    python tests/device/trt_api_tables.py --python PYTHON --out tests/device/trt_api.json WHEEL...

The wheels are the real bindings (`pip download --no-deps --only-binary=:all: tensorrt-cu12-bindings==VERSION`, before
10.0 `tensorrt==VERSION`), PYTHON is a CPython of the version they are built for. Only the bindings are unpacked; the
libraries they are linked against are stood in for by empty ones made with gcc, which is enough to import and look.

The file: {"versions": [...], "classes": {class: {"bases": {name: there}, "names": {name: kinds},
"members": {name: values}}}, "module": {name: kinds}}. `there` and `kinds` have one letter a version: "-" absent,
"m" method, "p" property, "c" class, "v" value, "x" there. `values` are an enum's integers, null where absent: some
move. Names a class inherits are those of its bases.
"""

import argparse
import json
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

LOOK = """
import importlib, inspect, json, sys
module = importlib.import_module(sys.argv[1])
kinds = {}
classes = {}

def kind(value):
    if inspect.isclass(value):
        return "c"
    if isinstance(value, property) or inspect.isdatadescriptor(value):
        return "p"
    return "m" if callable(value) or isinstance(value, (staticmethod, classmethod)) else "v"

def look(name, cls):
    members = dict(getattr(cls, "__members__", {}))
    names = {}
    for key, value in vars(cls).items():
        if key.startswith("_") or key in members:
            continue
        names[key] = kind(value)
        if inspect.isclass(value) and value.__qualname__ == cls.__qualname__ + "." + key:
            look(name + "." + key, value)
    classes[name] = {
        "bases": [base.__name__ for base in cls.__bases__ if base.__module__ == cls.__module__],
        "names": names,
        "members": {key: int(value) for key, value in members.items()},
    }

for key, value in vars(module).items():
    if key.startswith("_") or inspect.ismodule(value):
        continue
    kinds[key] = kind(value)
    if inspect.isclass(value):
        look(key, value)
print(json.dumps({"version": module.__version__, "classes": classes, "module": kinds}))
"""


def look(wheel: Path, python: str) -> dict[str, Any]:
    """{version, classes, module} of one wheel. CalledProcessError with the import's own words where it fails."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        root = Path(folder)
        names = [
            name for name in archive.namelist() if re.fullmatch(r"tensorrt(_bindings)?/.*(\.py|tensorrt\.so)", name)
        ]
        archive.extractall(root, names)
        (bindings,) = root.glob("*/tensorrt.so")
        _stub_libraries(bindings, root)
        done = subprocess.run(
            [python, "-c", LOOK, bindings.parent.name],
            cwd=root,
            env={"LD_LIBRARY_PATH": folder, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{wheel.name}: {done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def _stub_libraries(bindings: Path, folder: Path) -> None:
    """Every NVIDIA library that `bindings` is linked against, with every function it takes from them, doing nothing."""
    tell = {"capture_output": True, "text": True, "check": True}
    needed = subprocess.run(["readelf", "-d", str(bindings)], **tell).stdout  # type: ignore[call-overload]
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(bindings)], **tell).stdout  # type: ignore[call-overload]
    # Those of the C and C++ libraries carry a version behind an @, those of Python its prefix.
    names = re.findall(r"^\s+U (?!_?Py)(\w+)$", symbols, re.MULTILINE)
    (folder / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for library in re.findall(r"\[(libnv\S+|libcu\S+)\]", needed):
        target = str(folder / library)
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", target, str(folder / "stub.c")], check=True)


def merge(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """One table with a column a version."""

    def column(of: list[dict[str, str]]) -> dict[str, str]:
        return {name: "".join(each.get(name, "-") for each in of) for name in sorted(set().union(*of))}

    classes: dict[str, Any] = {}
    for name in sorted(set().union(*(table["classes"] for table in tables))):
        each = [table["classes"].get(name, {"bases": [], "names": {}, "members": {}}) for table in tables]
        members = sorted(set().union(*(one["members"] for one in each)))
        classes[name] = {
            "bases": column([dict.fromkeys(one["bases"], "x") for one in each]),
            "names": column([one["names"] for one in each]),
            "members": {member: [one["members"].get(member) for one in each] for member in members},
        }
        classes[name] = {key: value for key, value in classes[name].items() if value}
    return {
        "versions": [table["version"] for table in tables],
        "module": column([table["module"] for table in tables]),
        "classes": classes,
    }


def dump(table: dict[str, Any]) -> str:
    """JSON with one line a class: small, and a new version shows as changed lines."""
    classes = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in table["classes"].items())
    versions, module = json.dumps(table["versions"]), json.dumps(table["module"])
    return f'{{\n "versions": {versions},\n "module": {module},\n "classes": {{\n{classes}\n }}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", required=True, help="a CPython the wheels are built for")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("wheels", nargs="+", type=Path, help="oldest first")
    options = parser.parse_args()
    options.out.write_text(dump(merge([look(wheel.resolve(), options.python) for wheel in options.wheels])))


if __name__ == "__main__":
    main()
