"""Make links that lead out of docs/ work on the site: the files that they name are copied to it.

On GitHub `../benchmarks/results/speed_h100.json` is a file of the repository. The site has such files under `repository/`,
with `.txt` behind the names of Markdown and Python files, which a browser then shows. A link to a folder becomes plain text.
A link to what does not exist is left as it is, and the strict build reports it.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
SHOWN_AS_TEXT = {".cu", ".cuh", ".md", ".py", ".toml", ".yaml", ".yml"}

_LINK = re.compile(
    r"(?P<start>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)"
)
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown, page, config, files):
    folder = Path(config["docs_dir"], page.file.src_uri).parent

    def rewrite(match: re.Match) -> str:
        target = (folder / match["target"]).resolve()
        if not match["target"].startswith(".") or not target.is_relative_to(ROOT) or not target.exists():
            return match[0]
        if target.is_relative_to(config["docs_dir"]):
            return match[0]
        if target.is_dir():
            return match["text"]
        name = f"repository/{target.relative_to(ROOT).as_posix()}"
        if target.suffix in SHOWN_AS_TEXT:
            name += ".txt"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(target)))
        up = "../" * page.file.src_uri.count("/")
        return f"{match['start']}[{match['text']}]({up}{name})"

    parts = _FENCE.split(markdown)  # every other one is a block of code, in which nothing is a link
    return "".join(part if number % 2 else _LINK.sub(rewrite, part) for number, part in enumerate(parts))
