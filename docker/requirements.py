"""Print what a container needs of a pyproject.toml's dependencies: all, but Flower without its simulation (Ray)."""

import sys
import tomllib
from pathlib import Path

with Path(sys.argv[1]).open("rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *project.get("optional-dependencies", {}).get("tensorboard", [])]
print("\n".join(line.replace("flwr[simulation]", "flwr") for line in wanted))
