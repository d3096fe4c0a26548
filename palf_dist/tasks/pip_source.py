"""A program: bring the source distribution of a package, and run none of its code.

python -P pip_source.py NAME VERSION FOLDER

``pip download`` runs the setup.py of what it brings. This takes the file by the parts of pip that find and bring it, so
that pip's index, proxy, certificates and local folders are those that the user has set.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pip._internal.commands.download import DownloadCommand
from pip._vendor.packaging.specifiers import SpecifierSet


def main(name: str, version: str, folder: str) -> None:
    command = DownloadCommand("download", "")
    options, _ = command.parse_args(["--no-binary=:all:", "--no-cache-dir"])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate(name, specifier=SpecifierSet(f"=={version}")).best_candidate
        if found is None:
            sys.exit(f"ERROR: no source distribution of {name}=={version} was found")
        answer = session.get(found.link.url_without_fragment, headers={"Accept-Encoding": "identity"})
        answer.raise_for_status()
        Path(folder, found.link.filename).write_bytes(answer.content)


if __name__ == "__main__":
    main(*sys.argv[1:])
