# SPDX-License-Identifier: 0BSD
"""What .ci/run needs of README.md, and checks of all the files.

python3 .ci/readme.py check           licence lines, links, line lengths, stray paths
python3 .ci/readme.py commands        print the shell commands that vendor a copy
python3 .ci/readme.py samples FOLDER  write each Python sample to a file, for type checkers
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MODULE = (ROOT / "dub_customers.py").read_text("utf-8")
CI_RUN = (ROOT / ".ci" / "run").read_text("utf-8")
FILES = [path for path in [*ROOT.glob("*.*"), *ROOT.glob(".ci/*")] if path.is_file()]
LICENCE = "# SPDX-License-Identifier: 0BSD"


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def anchors() -> set[str]:
    """What a link within README.md can lead to, by GitHub's rule."""
    headings = re.findall("^##+ (.+)$", README, re.MULTILINE)
    return {"#" + re.sub("[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings}


def problems() -> list[str]:
    found: list[str] = []
    for path in FILES:
        text = path.read_text("utf-8")
        name = path.relative_to(ROOT)
        if path.suffix == ".py" and text.splitlines()[0] != LICENCE:
            found.append(f"{name}: the first line is not the licence")
        for stray in re.findall(r"/(?:work|root|home|Users)/\S*", text):
            found.append(f"{name}: a path of somebody's machine: {stray}")
        if re.search(r"[ \t]$", text, re.MULTILINE) or not text.endswith("\n"):
            found.append(f"{name}: blanks at the end of a line, or no line break at the end")
    for target in re.findall(r"\]\(([^)]+)\)", README):
        is_local = not target.startswith(("https://", "#"))
        if target.startswith("#") and target not in anchors():
            found.append(f"README.md: there is no heading for {target}")
        if is_local and not (ROOT / target).exists():
            found.append(f"README.md: there is no file {target}")
    for line in README.splitlines():
        if len(line) > 110:
            found.append(f"README.md: longer than 110 characters: {line}")
    [test_command] = re.findall("^python3 -m venv .*pytest$", README, re.MULTILINE)
    if test_command not in CI_RUN.splitlines():
        found.append("README.md: .ci/run runs another test command")
    [version] = re.findall('^__version__ = "([0-9]+[.][0-9]+[.][0-9]+)"$', MODULE, re.MULTILINE)
    if f"**{version}**" not in README:
        found.append(f"README.md: it does not list the changes of {version}")
    return found


def main() -> None:
    task = sys.argv[1]
    if task == "commands":
        [commands] = [each for each in blocks("sh") if "mkdir" in each]
        print(commands)
    elif task == "samples":
        for number, sample in enumerate(blocks("python"), start=1):
            Path(sys.argv[2], f"readme_sample_{number}.py").write_text(sample, "utf-8")
    else:
        sys.exit("\n".join(problems()) or None)


if __name__ == "__main__":
    main()
