"""A hook of MkDocs for what the site takes from outside docs/: some pages, pictures, and links to the repository.

Links in the pages are those of the repository, so that they work on its host and in an editor as well. Here they are
turned to the site's own pages where there are such, to a copy of a picture, or else to the file in the repository. A
link to a file that does not exist stops the build.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # in the repository: in the site
    "CHANGELOG.md": "project/changelog.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "csrc/README.md": "project/native.md",
    "README.md": "index.md",
}
PICTURES = {"benchmarks/results/scaling-amd-epyc-2.png": "images/scaling-amd-epyc-2.png"}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files, config):
    for source, name in (PAGES | PICTURES).items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    at = page.file.src_uri
    taken = {site: source for source, site in PAGES.items() if site != "index.md"}
    source = PurePosixPath(taken.get(at, f"docs/{at}"))

    def turned(match):
        start, link, anchor, end = match[1], match[2], match[3] or "", match[4]
        target = os.path.normpath(source.parent / link)
        if not (ROOT / target).exists():
            raise PluginError(f"{source} links to {link}, which is not there")
        if target in PAGES | PICTURES:
            inside = (PAGES | PICTURES)[target]
        elif target.startswith("docs/"):
            inside = target.removeprefix("docs/")
        else:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{start}{config.repo_url}/{kind}/main/{target}{anchor}{end}"
        return f"{start}{os.path.relpath(inside, PurePosixPath(at).parent)}{anchor}{end}"

    code = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
    parts = code.split(markdown)
    return "".join(part if index % 2 else LINK.sub(turned, part) for index, part in enumerate(parts))
