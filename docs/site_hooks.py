"""Hooks of mkdocs: pages from outside docs/, and links that work on the site as they do in the repository."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Markdown files outside docs/ that are pages of the site, under the same path
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "config/README.md",
    "resources/tiny-reader/README.md",
    "resources/tiny-follower/README.md",
)


def on_files(files, config):
    """Add the pages from outside docs/."""
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links between docs/ and the rest of the repository.

    On the site, docs/ is the root: ``../config/README.md`` becomes ``config/README.md``, and ``docs/data.md`` in a page
    from outside becomes ``data.md``. A link to a file that is no page becomes plain text.
    """
    source = page.file.src_uri
    place = Path(source).parent if source in PAGES else Path("docs") / Path(source).parent
    here = Path(source).parent

    def rewrite(match: re.Match) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if re.match(r"[a-z]+:|#", target) or not target:
            return match[0]
        path = (ROOT / place / target).resolve()
        if not path.exists() or ROOT not in path.parents:
            return match[0]  # mkdocs reports what does not exist
        inside = path.relative_to(ROOT).as_posix()
        uri = inside.removeprefix("docs/") if inside.startswith("docs/") else inside
        if inside == "README.md":
            uri = "index.md"
        if files.get_file_from_path(uri) is None:
            return text
        up = "../" * len(here.parts)
        return f"{match['open']}{up}{uri}{anchor})"

    link = r"(?P<open>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)"
    return re.sub(link, rewrite, markdown)
