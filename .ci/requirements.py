"""Print requirements of pyproject.toml, one per line: ``build`` (to compile), ``core`` (to run) or the name of an extra."""

import sys
import tomllib
from pathlib import Path

data = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = {
    "build": data["build-system"]["requires"],
    "core": data["project"]["dependencies"],
    **data["project"]["optional-dependencies"],
}
for name in sys.argv[1:]:
    print("\n".join(groups[name]))
