"""Writes docs/notebook.md: examples/python_api.py as a notebook that was executed, with what it printed and drew.

python -m tools.notebook_page
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "python_api.py"
PAGE = ROOT / "docs" / "notebook.md"
FIGURES = PAGE.parent / "figures" / "notebook"

INTRODUCTION = """# A notebook

`examples/python_api.py` of the repository, cell by cell, as it was executed: all that the command line does, with
Lightning's own Trainer. It opens in an editor that knows `# %%` cells, or as a notebook by `jupytext --to notebook`.
This page is written by `python -m tools.notebook_page`; another processor may differ in the last digits.
"""


def notebook() -> NotebookNode:
    """The example as a notebook, not executed; the titles of its cells are text."""
    read = jupytext.reads(SOURCE.read_text(), fmt="py:percent")
    for cell in read.cells:
        cell.metadata = NotebookNode(title=cell.metadata.get("title", ""))
    read.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return read


def execute(unexecuted: NotebookNode, folder: Path) -> NotebookNode:
    """Execute it.

    Args:
        unexecuted: the notebook; its cells get their outputs.
        folder: where its runs are written.

    Returns:
        The notebook.
    """
    path = NotebookNode(cell_type="code", source=f"import sys; sys.path.insert(0, {str(ROOT)!r})", metadata={})
    path |= {"outputs": [], "execution_count": None, "id": "path"}
    client = NotebookClient(
        unexecuted, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    unexecuted.cells.insert(0, path)
    client.execute()
    del unexecuted.cells[0]
    return unexecuted


def page(executed: NotebookNode) -> tuple[str, dict[str, bytes]]:
    """The page's text, and its figures by their names."""
    parts, figures = [INTRODUCTION], {}
    for number, cell in enumerate(executed.cells):
        cell.outputs = [output for output in map(_plain, cell.get("outputs", [])) if output is not None]
        alone = NotebookNode(nbformat=4, nbformat_minor=5, metadata=executed.metadata, cells=[cell])
        text, resources = MarkdownExporter().from_notebook_node(alone)
        for name, content in resources["outputs"].items():
            figure = f"cell{number}{Path(name).suffix}"
            figures[figure] = content
            text = text.replace(f"]({name})", f"](figures/notebook/{figure})").replace("![png]", "![The figure]")
        if cell.metadata.title:
            parts.append(f"\n## {cell.metadata.title.rstrip('.')}\n")
        # a text that is not code is the docstring of the file, which the introduction stands for
        if cell.cell_type == "code" and not cell.source.startswith('"""'):
            parts.append(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n") + "\n")
    return "\n".join(parts).replace("\n\n\n", "\n\n"), figures


def _plain(output: NotebookNode) -> NotebookNode | None:
    """An output as text without colours, or as a picture; nothing of warnings and logs, which tell of the machine."""
    if output.get("name") == "stderr":
        return None
    if "png" in str(list(output.get("data", {}))):
        return output
    text = output.text if output.output_type == "stream" else output.data.get("text/plain", "")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip("\n")
    return NotebookNode(output_type="stream", name="stdout", text=text + "\n") if text.strip() else None


def main() -> None:
    """Execute the example and write the page and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        text, figures = page(execute(notebook(), Path(folder)))
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        (FIGURES / name).write_bytes(content)
    PAGE.write_text(text)
    print(f"written: {PAGE.relative_to(ROOT)} and {len(figures)} figures", file=sys.stderr)


if __name__ == "__main__":
    main()
