"""What is in git stays small, and names no machine and no package host."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 1 << 20
# Put together here, so that this file does not find itself.
REGISTRIES = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry." + "npm",
    "deb." + "debian.org",
    "conda." + "anaconda",
]
MACHINE = [str(ROOT), "/wo" + "rk/", "/ro" + "ot/", "/opt/" + "pypi"]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 50
    return files


def test_no_file_in_git_is_large() -> None:
    assert [path for path in tracked() if path.stat().st_size > LIMIT_BYTES] == []


def test_no_package_host_and_no_path_of_this_machine() -> None:
    pattern = re.compile("|".join(map(re.escape, REGISTRIES + MACHINE)))
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def test_the_lock_has_hashes_and_no_addresses() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith(" ")]
    assert all(re.match(r"[a-z0-9.\-]+==[^ ]+( ;.*)? \\$", line) for line in pins)
    assert all(re.match(r"    --hash=sha256:[0-9a-f]{64}( \\)?$", line) for line in lines if line.startswith(" "))
    assert {"torch", "torchvision", "click", "pytest"} <= {pin.partition("==")[0] for pin in pins}
