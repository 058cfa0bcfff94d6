"""One version, told three times."""

import re
import tomllib
from pathlib import Path

import kdedge

ROOT = Path(__file__).resolve().parents[2]


def test_changelog_and_package_have_one_version() -> None:
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert released[0] == kdedge.__version__ == project["version"]


def test_every_dependency_is_justified() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*document["project"]["dependencies"]]
    wanted += [one for group in document["dependency-groups"].values() for one in group if isinstance(one, str)]
    wanted += [one for extra in document["project"]["optional-dependencies"].values() for one in extra]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    justified = re.findall(r"^- `([^`]+)`: \S", text[text.index("## Dependencies") :], re.MULTILINE)
    assert sorted(justified) == sorted(re.split(r"[><=~\[]", requirement)[0] for requirement in wanted)
