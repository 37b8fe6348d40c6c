"""What the device side needs: python benchmarks/device_install.py.

Installs mmedge alone into a new environment and states the size of every package that comes with it, as downloaded and
as installed, and how long imports take (best of several, since the machine may do other things).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "device-install.json"
FORBIDDEN = ("torch", "onnx", "onnxruntime")
IMPORTS = {"import mmedge": ["-c", "import mmedge"], "mmedge --help": ["-m", "mmedge.cli.main", "--help"]}
REPEATS = 7


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip("wheel", "--no-deps", "--wheel-dir", str(folder / "own"), str(ROOT))
        (wheel,) = (folder / "own").glob("*.whl")
        pip("download", "--dest", str(folder / "all"), str(wheel))
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        before = installed(python)
        subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, stderr=subprocess.DEVNULL)
        packages = {key: size for key, size in installed(python).items() if key not in before}
        downloads = {file.name.partition("-")[0]: file.stat().st_size for file in (folder / "all").iterdir()}
        found: dict[str, Any] = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "download_bytes": dict(sorted(downloads.items(), key=lambda item: -item[1])),
            "download_mb": round(sum(downloads.values()) / 1e6, 1),
            "installed_bytes": dict(sorted(packages.items(), key=lambda item: -item[1])),
            "installed_mb": round(sum(packages.values()) / 1e6, 1),
            "forbidden": [each for each in FORBIDDEN if each in packages],
            "seconds": {label: round(best(python, arguments), 3) for label, arguments in IMPORTS.items()},
        }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q"], check=True, stderr=subprocess.DEVNULL)


def installed(python: Path) -> dict[str, int]:
    """Bytes of each installed distribution."""
    code = (
        "import json\nfrom importlib.metadata import distributions\n"
        "print(json.dumps({d.name: sum(f.locate().stat().st_size for f in d.files or () if f.locate().exists())"
        " for d in distributions()}))"
    )
    return dict(json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout))


def best(python: Path, arguments: list[str]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run([python, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
