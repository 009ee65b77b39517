"""The links of the docs to lines of code, each followed by the lines themselves:

    python docs/line_links.py        # puts the right line numbers into docs/*.md

A link is [any text](../tiny_diffusion/FILE.py#L12), and the code block below it quotes the file from that line on.
tests/test_docs.py checks that every quote is there; where code has moved, this sets the numbers again.
"""

import re
import sys
import textwrap
from pathlib import Path

DOCS = Path(__file__).parent
QUOTE = re.compile(r"\]\((\.\./tiny_diffusion/[\w/]+\.py)#L(\d+)\)[^\n]*\n\n```python\n(.*?)```", re.DOTALL)


def lines_of(path: Path, quote: str) -> list[int]:
    """The line numbers, from 1, at which a file holds these lines, indented by any amount."""
    wanted, text = quote.splitlines(), path.read_text("utf-8").splitlines()
    starts = range(len(text) - len(wanted) + 1)
    return [i + 1 for i in starts if textwrap.dedent("\n".join(text[i : i + len(wanted)])).splitlines() == wanted]


def with_right_numbers(markdown: str, folder: Path = DOCS) -> str:
    """The text with the line number of each link set to where its quote stands.  Raises ValueError if it is nowhere."""

    def right(match: re.Match) -> str:
        path, _, quote = match.groups()
        found = lines_of(folder / path, quote)
        if not found:
            raise ValueError(f"{path} does not hold these lines any more:\n{quote}")
        return re.sub(r"#L\d+", f"#L{found[0]}", match.group(0), count=1)

    return QUOTE.sub(right, markdown)


if __name__ == "__main__":
    for file in sorted(DOCS.glob("*.md")):
        before = file.read_text("utf-8")
        if (after := with_right_numbers(before)) != before:
            file.write_text(after, "utf-8")
            print(f"{file.name}: line numbers set", file=sys.stderr)
