"""What a built wheel holds: everything that the package reads at run time, the small model within its size, no more.

python tests/check_wheel.py build/wheel/*.whl
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

SOURCES = Path(__file__).parent.parent / "src"
MODEL = "bytelane/data/small/"
MODEL_BYTES = 5_000_000
LIBRARY_BYTES = 20_000_000
"""Of the whole wheel: kernels for every instruction set beside the model."""


def source_files(root: Path = SOURCES) -> set[str]:
    """The package's own files, as a wheel names them."""
    found = (p for p in (root / "bytelane").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(root).as_posix() for p in found if p.suffix != ".so"}


def problems(names: dict[str, int], wheel_bytes: int, sources: set[str]) -> list[str]:
    """What is wrong with a wheel, one line each.

    Args:
        names: its files and what each takes, compressed.
        wheel_bytes: of the wheel.
        sources: the files that must be in it.
    """
    inside = {n for n in names if ".dist-info/" not in n}
    native = sorted(n for n in inside if PurePosixPath(n).suffix == ".so")
    found = [f"{n} is missing" for n in sorted(sources - inside)]
    found += [f"{n} does not belong there" for n in sorted(inside - sources - set(native))]
    if len(native) != 1 or not native[0].startswith("bytelane/_native."):
        found.append(f"one native module belongs there, found {native}")
    if not any(n.endswith("/LICENSE") for n in names):
        found.append("the licence is missing")
    model = sum(taken for n, taken in names.items() if n.startswith(MODEL))
    if not 0 < model <= MODEL_BYTES:
        found.append(f"the small model takes {model} bytes, of at most {MODEL_BYTES}")
    if wheel_bytes > LIBRARY_BYTES:
        found.append(f"the wheel has {wheel_bytes} bytes, of at most {LIBRARY_BYTES}")
    return found


def main(arguments: Sequence[str]) -> None:
    """Check each wheel named."""
    if not arguments:
        sys.exit("check_wheel: name a wheel")
    for path in map(Path, arguments):
        with zipfile.ZipFile(path) as wheel:
            names = {i.filename: i.compress_size for i in wheel.infolist() if not i.is_dir()}
        wrong = problems(names, path.stat().st_size, source_files())
        if wrong:
            sys.exit("\n".join(f"{path.name}: {line}" for line in wrong))
        model = sum(taken for n, taken in names.items() if n.startswith(MODEL))
        print(json.dumps({"wheel": path.name, "bytes": path.stat().st_size, "model_bytes": model, "files": len(names)}))


if __name__ == "__main__":
    main(sys.argv[1:])
