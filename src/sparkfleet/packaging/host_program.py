"""Packs what runs on a Spark as a service (the switch of releases, the guard) into one file for its own Python."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from sparkfleet.packaging import archive
from sparkfleet.paths import ROOT

NAME = "sparkfleet_host.pyz"
PACKAGE = "sparkfleet_host"
SOURCE = ROOT / "plugins" / "module_utils" / PACKAGE
ROLE = ROOT / "roles" / "guard"
MAIN = f"import sys\n\nfrom {PACKAGE}.__main__ import main\n\nsys.exit(main())\n"


def build(folder: Path) -> Path:
    """`folder`/sparkfleet_host.pyz, rebuilt only when a source changed; equal sources give equal bytes."""
    content = {f"{PACKAGE}/{path.name}": path.read_bytes() for path in sorted(SOURCE.glob("*.py"))}
    content["__main__.py"] = MAIN.encode()
    # Not read there: a changed unit is a changed program, so that hosts get both.
    for path in (*sorted((ROLE / "templates").glob("*.j2")), ROLE / "vars" / "main.yml"):
        content[f"units/{path.name}"] = path.read_bytes()
    digest = hashlib.sha256()
    for name in sorted(content):
        digest.update(f"{name}\0{len(content[name])}\0".encode() + content[name])
    target, key = folder / NAME, digest.hexdigest()
    return target if archive.key_of(target) == key else archive.write(target, content, key)


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
