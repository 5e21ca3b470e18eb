"""A virtual environment for each contender under build/peers, with the versions that the page was written with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "peers"

PACKAGES: dict[str, tuple[str, ...]] = {
    "hyperqueue": ("hyperqueue==0.27.0",),
    "dask": ("distributed==2026.8.0", "dask==2026.8.0", "cloudpickle==3.1.3"),
    "ray": ("ray==2.60.0",),
    # kombu 5.7 imports packaging and does not ask for it.
    "celery": ("celery==5.7.0", "redis==8.1.0", "packaging==25.0"),
    "profiler": ("py-spy==0.4.3",),  # no contender: what bench.profile samples with
}


def prepare(name: str) -> Path:
    """The contender's interpreter; installed if it is not there yet, or is another version."""
    if name == "meshd":
        return Path(sys.executable)
    if name == "celery" and shutil.which("redis-server") is None:
        raise SystemExit("Celery's row needs Redis: `apt-get install redis-server`, or leave it out with --contenders")
    venv = HOME / name
    python, stamp = venv / "bin/python", venv / "installed"
    wanted = "\n".join(PACKAGES[name])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {wanted.replace(chr(10), ', ')} into {venv.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES[name]], check=True)
        stamp.write_text(wanted)
    return python
