"""Links of the documentation that lead out of docs/, made to work in the site.

Pages link to files of the checkout, such as ``../launch/README.md``. On the site pictures are
copied, and other files are shown where the site's ``repo_url`` has them, or by their name if it has
none.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\.\./([^)\s]+)\)")
"""[1] "!" of a picture, [2] the text, [3] the path from the checkout on."""
PICTURES = "benchmarks/plots"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures that the benchmarks drew."""
    root = Path(config.docs_dir).parent
    for picture in sorted((root / PICTURES).glob("*.svg")):
        source = str(picture.relative_to(root))
        files.append(File.generated(config, source, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite the links of a page that lead out of docs/."""

    def rewrite(link: re.Match[str]) -> str:
        mark, text, path = link.groups()
        if PurePosixPath(path).is_relative_to(PICTURES):
            return f"{mark}[{text}]({path})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text

    return LINK.sub(rewrite, markdown)
