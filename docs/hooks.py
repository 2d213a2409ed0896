"""Let links lead out of docs/ on the site, as they do on GitHub.

Pages at the root of the repository (`PAGES`) become pages of the site. Other files that a page links to are copied to
`repository/`; the name of a source file gets a `.txt`, and a browser then shows it. A link to a folder becomes plain
text. A link to a missing file stays as it is, and the strict build reports it.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {ROOT / "CONTRIBUTING.md": "contributing.md", ROOT / "CHANGELOG.md": "changelog.md"}
SHOWN_AS_TEXT = {".cu", ".cuh", ".md", ".py", ".toml", ".yaml", ".yml"}

_LINK = re.compile(
    r"\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>(?![a-z]+:|#)[^()\s#]+)(?P<anchor>#[^()\s]*)?\)"
)
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = Path(page.file.abs_src_path).resolve().parent

    def rewrite(match: re.Match) -> str:
        target = (folder / match["target"]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        if target.is_dir():
            return match["text"]
        name = _name_on_the_site(target)
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(target)))
        relative = os.path.relpath(name, os.path.dirname(page.file.src_uri) or ".").replace(os.sep, "/")
        return f"[{match['text']}]({relative}{match['anchor'] or ''})"

    parts = _FENCE.split(markdown)  # every other one is a block of code, in which nothing is a link
    return "".join(part if number % 2 else _LINK.sub(rewrite, part) for number, part in enumerate(parts))


def _name_on_the_site(path: Path) -> str:
    if path in PAGES:
        return PAGES[path]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = f"repository/{path.relative_to(ROOT).as_posix()}"
    return f"{name}.txt" if path.suffix in SHOWN_AS_TEXT else name
