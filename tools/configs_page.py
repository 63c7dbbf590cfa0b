"""Writes docs/configs.md: the configurations that come with the package, and what is tuned where.

python -m tools.configs_page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flow_pl import shipped

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configs.md"

INTRODUCTION = """# Configurations

A run is composed of files that come with the package. A name finds the shipped file where there is no such path:

    flow-pl configs
    flow-pl configs copy task/digits .
    flow-pl fit -c task/emnist -c tuned/emnist/flow -c ablation/routing_hard --print_config

A task has data, backbone, budget and rounds; a method is the same for every task. `tuned/<task>/<method>` has a method
with the settings that were chosen for a task, on validation examples or by its paper, and takes the place of
`method/<method>`. Later files win. The run's folder follows from the names: `runs/<task>/<method>`.

This page is written by `python -m tools.configs_page`.
"""


def settings(name: str) -> dict[str, Any]:
    """Settings of a method's file."""
    return yaml.safe_load(shipped.find(name).read_text())["model"]["method"].get("init_args") or {}


def cell(value: Any) -> str:
    """A setting in a table."""
    if not isinstance(value, dict):
        return str(value)
    if "class_path" in value:
        return f"{value['class_path']}({cell(value.get('init_args', {}))})"
    return ", ".join(f"{key} {cell(inner)}" for key, inner in value.items())


def page() -> str:
    """The page's text."""
    names = shipped.names()
    parts = [INTRODUCTION]
    for kind, meaning in shipped.KINDS.items():
        parts += [f"\n## {kind}/\n\n{meaning[0].upper()}{meaning[1:]}.\n\n| name | what it is |\n|---|---|\n"]
        parts += [f"| `{name}` | {shipped.title(name)} |\n" for name in names if name.startswith(f"{kind}/")]
    parts += ["\n## What is tuned where\n\nSettings that differ from those of `method/`.\n\n"]
    parts += ["| task | method | settings |\n|---|---|---|\n"]
    for name in names:
        if name.startswith("tuned/"):
            _, task, method = name.split("/")
            general = settings(f"method/{method}")
            own = {key: value for key, value in settings(name).items() if general.get(key) != value}
            parts.append(f"| `{task}` | `{method}` | {cell(own) or 'as in method/'} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
