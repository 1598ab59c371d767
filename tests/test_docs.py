"""The documents against the tree: what README, CONTRIBUTING, PAPER and TOUR name is there.

That documented commands parse and that logged keys are explained is in test_commands.py.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md") + tuple(
    f"docs/{name}.md" for name in ("PAPER", "TOUR", "RUNS", "DATA")
)
FOLDERS = ("kernels", "toy", "runtime", "studies", "bench")
ENTRY = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def names_of(path):
    """Functions, classes and names of a file; what belongs to a class as Class.name."""

    def within(body, prefix=""):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from within(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign):
                yield prefix + ast.unparse(node.target)
            elif isinstance(node, ast.Assign):
                yield from (prefix + ast.unparse(target) for target in node.targets)
            elif isinstance(node, ast.If):
                yield from within(node.body + node.orelse, prefix)

    return set(within(ast.parse(text_of(path)).body)) if (ROOT / path).is_file() else set()


def rows():
    """(first cell, place, proof) of every row of docs/PAPER.md's tables."""
    for line in text_of("docs/PAPER.md").split("\n## Where this differs")[0].splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| idea")):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 4, f"docs/PAPER.md: four cells expected: {line}"
            yield cells[0], cells[2], cells[3]


def test_every_entry_of_the_paper_exists():
    missing = [
        f"{document}: `{path}:{name}`"
        for document in DOCUMENTS
        for path, name in ENTRY.findall(text_of(document))
        if name not in names_of(path)
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_every_idea_has_a_place_and_a_proof():
    """The last cell names tests, the one before names what is no test."""
    broken = []
    for idea, place, proof in rows():
        places, proofs = ENTRY.findall(place), ENTRY.findall(proof)
        if not places or any(path.startswith("tests/") for path, _ in places):
            broken.append(f"{idea}: the place is no entry of the code: {place}")
        if not proofs or not all(path.startswith("tests/test_") for path, _ in proofs):
            broken.append(f"{idea}: the proof is no test: {proof}")
    ideas = [idea for idea, *_ in rows()]
    broken += [f"{idea}: several rows" for idea in set(ideas) if ideas.count(idea) > 1]
    assert len(ideas) > 40 and not broken, "\n" + "\n".join(broken)


def test_every_concept_is_in_the_paper():
    """A file at the top is a concept or a command of the paper: some idea lives there."""
    named = {path for _, place, _ in rows() for path, _ in ENTRY.findall(place)}
    commands_without_an_idea = {"evaluate.py"}  # it calls studies/, where the ideas are
    missing = {path.name for path in ROOT.glob("*.py")} - named - commands_without_an_idea
    assert not missing, f"docs/PAPER.md names nothing of {', '.join(sorted(missing))}"


def paths_of(text):
    """What is named in backticks, or is the target of a link."""
    for word in re.findall(r"`([^`]+)`", text):
        word = word.split(":")[0]
        if re.fullmatch(r"[\w./-]+(\.(py|md|toml|txt|sh|png)|/)", word):
            yield word
    yield from re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document):
    made_by_runs = ("out/", "samples/", "model/")
    base = (ROOT / document).parent
    missing = {
        path
        for path in paths_of(text_of(document))
        if not path.startswith(made_by_runs)
        and not any((start / path).exists() for start in (ROOT, base))
    }
    assert not missing, f"{document} names {', '.join(sorted(missing))}"


def test_the_map_is_complete():
    """README's tree has every file at the top and every folder, and is short."""
    readme = text_of("README.md")
    assert len(readme.encode()) <= 10_000
    start = readme.index("## What is where")
    tree = readme[start : readme.index("\n## ", start + 1)]
    names = [*(path.name for path in ROOT.glob("*.py")), *(f"{folder}/" for folder in FOLDERS)]
    missing = [name for name in sorted(names) if name not in tree]
    assert not missing, f"README's tree leaves out {', '.join(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_papers_ideas_go_by_their_names(document):
    numbered = re.findall(r"(?<!BAGEL\.md )§ ?[\d.]+|\b[Ss]ections? \d[\d.]*", text_of(document))
    assert not numbered, f"{document}: {', '.join(numbered)}"


def test_what_the_readme_installs_and_tests_is_what_ci_does():
    readme, ci = text_of("README.md"), text_of(".ci/run")
    for words in ("pip install -r requirements.txt", "python -m pytest -n 2 --dist loadfile"):
        assert words in readme and words in ci
    assert "ruff format --check ." in ci and "ruff check ." in ci
    assert re.search(r"^ruff>=", text_of("requirements.txt"), re.MULTILINE)
