"""What every file of the repository owes its readers: links that lead somewhere, no leftovers, a readable length."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 450  # lines
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

# Patterns are put together from halves, so that this file does not hold what it forbids.
HOME_OF_SOMEBODY = r"(?<![\w.:/~-])/(?:home|root|Users|work|workspace|data|mnt|scratch|opt|srv)" + r"/\w"
TEMPORARY_FOLDER = r"(?<![\w.:/~-])/tm" + r"p/\w"
REGISTRY_HOST = r"\b(?:files\.pythonhosted|test\.pypi|pypi)\.or" + r"g\b|\b(?:download\.pytorch)\.or" + r"g\b"
LEFTOVER = (
    r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|no" + r"qa)\b|Not" + r"ImplementedError|<<<<<" + r"<< |>>>>>" + r">> "
)
DEAD_TEST = r"\bx" + r"fail\b|pytest\.mark\.sk" + r"ip\(|set_" + r"trace\(|breakpo" + r"int\("


def tracked_files() -> list[Path]:
    """Files git knows or would know, links left out; of an unpacked archive without git, all files."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        paths = [path for path in ROOT.rglob("*") if not {"build", "dist", "runs"} & set(path.parts)]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink() and not _hidden_or_built(path))


def _hidden_or_built(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return any(part in (".git", "__pycache__") or part.endswith(".egg-info") for part in parts)


def texts() -> list[tuple[str, str]]:
    """(path from the root, text) of every file that is text."""
    found = []
    for path in tracked_files():
        try:
            found.append((path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a picture
    return found


def hits(pattern: str, files: list[tuple[str, str]]) -> list[str]:
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in files
        for match in re.finditer(pattern, text)
    ]


def markdown() -> list[str]:
    return [name for name, _ in texts() if name.endswith(".md")]


def anchors(text: str) -> set[str]:
    """The fragments GitHub gives a Markdown file's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", markdown())
def test_links_lead_somewhere(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue  # another site: not looked up from a test
        path, _, fragment = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: the link to {target} leads nowhere"
        if fragment:
            assert fragment in anchors(file.read_text(encoding="utf-8")), f"{name}: {target} names no heading"


@pytest.mark.parametrize(
    "pattern", [HOME_OF_SOMEBODY, TEMPORARY_FOLDER, REGISTRY_HOST], ids=["home", "temporary", "registry"]
)
def test_no_machine_and_no_registry_is_named(pattern: str):
    found = hits(pattern, texts())
    assert not found, "\n".join(found)


def test_no_leftovers():
    code = [(name, text) for name, text in texts() if name.endswith((".py", ".yaml", ".yml", ".md", ".toml"))]
    found = hits(LEFTOVER, code) + hits(DEAD_TEST, code)
    assert not found, "\n".join(found)


def test_files_stay_short_enough_to_read():
    long = [
        f"{name}: {len(text.splitlines())} lines" for name, text in texts() if name.endswith((".py", ".md", ".yaml"))
    ]
    long = [line for line in long if int(line.split()[-2]) > LONGEST]
    assert not long, long


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (HOME_OF_SOMEBODY, "root: /ho" + "me/me/data"),
        (TEMPORARY_FOLDER, "open('/tm" + "p/x')"),
        (REGISTRY_HOST, "https://pypi.or" + "g/simple"),
        (LEFTOVER, "# TO" + "DO later"),
        (DEAD_TEST, "@pytest.mark.x" + "fail"),
    ],
)
def test_each_pattern_finds_what_it_is_for(pattern: str, text: str):
    assert re.search(pattern, text)


@pytest.mark.parametrize(
    "text", ["a/work/b", "https://example.com/data/x.txt", "../data/text", "~/data/x", "and/or", "B/T/mp/x"]
)
def test_ordinary_paths_pass(text: str):
    assert not any(re.search(pattern, text) for pattern in (HOME_OF_SOMEBODY, TEMPORARY_FOLDER, REGISTRY_HOST))
