"""Pages of the site that lie elsewhere in the repository, for mkdocs: the README as its front page,
the changelog, the guide for contributors, and the notebooks. Their links are turned to the site's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s#]*)")


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: Any, **_: Any) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_LINK.sub(_turned, text)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        place = f"notebooks/{notebook.name}"
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Guides name what lies above them as they do on GitHub."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return re.sub(r"(\]\()\.\./([^)\s#]*)", _turned, markdown)


def _turned(link: re.Match[str]) -> str:
    """A link from the repository's root as one from the site's."""
    target = link[2].rstrip("/")
    if target == "notebooks":
        target = "notebooks/quickstart.ipynb"
    return link[1] + PAGES.get(target, target.removeprefix("docs/"))
