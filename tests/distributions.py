"""Distributions as an installer leaves them: metadata, entry points and modules in a folder on sys.path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

PLUGIN = """
    from pathlib import Path
    from typing import Literal
    from storebackends.plugin import BackendSpec, Options, Support, hookimpl

    class ToyOptions(Options):
        level: int = 1
        mode: Literal["fast", "safe"] = "safe"
        folder: Path | None = None

    SPEC = BackendSpec("toy", ToyOptions, "toy_driver:Toy", lambda path: Support(True))

    @hookimpl
    def storebackends_backends():
        return [SPEC]
"""


def install(folder: Path, name: str, plugins: Mapping[str, str], extras: str = "", **modules: str) -> None:
    """Install version 1.0 of *name* into *folder*, with its entry points, and each module's source (`a/b` is a.b)."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    extra = f"Provides-Extra: {extras}\n" if extras else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{extra}")
    points = "".join(f"{point} = {value}\n" for point, value in plugins.items())
    (info / "entry_points.txt").write_text(f"[storebackends]\n{points}")
    for module, source in modules.items():
        file = folder / f"{module}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(source), encoding="utf-8")
        sys.modules.pop(module.replace("/", ".").removesuffix(".__init__"), None)
    importlib.invalidate_caches()
