"""What the installed package says of itself, as far as tests need it."""

import atexit
import os
import shutil
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def declared():
    """Group of entry points -> name -> function, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"console_scripts": project["scripts"], **project["entry-points"]}


def installed():
    """The same, as they are installed; nothing where the package is not."""
    try:
        found = metadata.distribution("wan-loader").entry_points
    except metadata.PackageNotFoundError:
        return {}
    return {group: {e.name: e.value for e in found.select(group=group)} for group in found.groups}


def install_entry_points():
    """Give this process and those that it starts the entry points of this tree, where others or none are installed."""
    if installed() == declared():
        return
    place = Path(tempfile.mkdtemp(prefix="wan-loader-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    about = place / "wan_loader-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wan-loader\nVersion: 0\n")
    groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in declared().items())
    (about / "entry_points.txt").write_text("\n".join(groups))
    sys.path.insert(0, str(place))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
