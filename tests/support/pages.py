"""The Markdown pages of the repository, and what is in them."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [
    page
    for folder in (".", "docs", "launch", "benchmarks")
    for page in sorted((ROOT / folder).glob("*.md"))
]

_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    """Return the code blocks of a page that are in ``language``."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def links(page):
    """Return the targets of a page's links and images, those in code blocks left out."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page):
    """Return the anchors that code hosts give to the headings of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found, counts = [], Counter()
    for heading in re.findall(r"^#+ +(.*?)\s*$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found


def name_of(page):
    """Return the path of a page from the root of the repository, to name a test by."""
    return str(page.relative_to(ROOT))
