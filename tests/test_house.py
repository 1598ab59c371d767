"""The house rules, read from the source: each test is one rule and names whatever breaks it.

Project code is what stands at the top and in the folders beside it; tests keep only the rules of
form. Nothing is imported and nothing is run but ruff.
"""

import ast
import functools
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CONCEPTS = ("sequence", "model", "vision", "flow", "iccot", "reward")
COMMANDS = ("sft", "grpo", "sample", "evaluate", "curate", "demo")
FOLDERS = ("kernels", "toy", "runtime", "studies", "bench")
PAPERS = ("README.md", "LOG.md", "RESULTS.md", "LICENSE", "CONTRIBUTING.md")
SETTINGS = ("pyproject.toml", "requirements.txt", "requirements-optional.txt")

FILES = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.py"))]
PROJECT = [path.relative_to(ROOT).as_posix() for path in sorted(FILES)]
TESTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("tests/**/*.py"))]
HERE = "tests/test_house.py"

MODULES = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in PROJECT
}

# heavy or optional: these alone may be imported where they are needed
LATE_IMPORTS = (
    "bitsandbytes",
    "huggingface_hub",
    "matplotlib",
    "openai",
    "pyarrow",
    "tokenizers",
    "torch.nn.attention",
    "torch.utils.tensorboard",
    "transformers",
    "triton",
    "wandb",
)


@functools.cache
def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def tree_of(path):
    return ast.parse(text_of(path), path)


@functools.cache
def nodes_of(path):
    return tuple(ast.walk(tree_of(path)))


def passed(broken):
    """Fail with one line for each place that breaks the rule."""
    assert not broken, "\n" + "\n".join(broken)


@functools.cache
def functions_of(path):
    """(function, its class or None) of a file, nested ones too."""
    owner = {
        id(child): node
        for node in nodes_of(path)
        if isinstance(node, ast.ClassDef)
        for child in node.body
    }
    return [
        (node, owner.get(id(node)))
        for node in nodes_of(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def is_dunder(name):
    return name.startswith("__") and name.endswith("__")


def is_private(name):
    return name.startswith("_") and not is_dunder(name) and name != "_"


def comments_of(path, words):
    """(line, text) of every comment that the pattern fits; what stands in a string is none."""
    if re.search(words, text_of(path)):
        for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline):
            if token.type == tokenize.COMMENT and re.search(words, token.string):
                yield token.start[0], token.string


def prose_of(path, words):
    """(line, text) of every comment and docstring that the pattern fits."""
    yield from comments_of(path, words)
    for node in nodes_of(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str) and (found := re.search(words, text)):
                yield node.lineno + text.count("\n", 0, found.start()), text


@functools.cache
def imports_of(path):
    """[(line, module, names taken from it, inside a function or not)], one for each import."""
    found = []
    inside = {
        id(node)
        for function, _ in functions_of(path)
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append((node.lineno, alias.name, (), id(node) in inside))
        elif isinstance(node, ast.ImportFrom):
            plain = []
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    found.append((node.lineno, whole, (), id(node) in inside))
                else:
                    plain.append(alias.name)
            if plain:
                found.append((node.lineno, node.module, tuple(plain), id(node) in inside))
    return found


def ours(module):
    return module in MODULES or module.split(".")[0] in FOLDERS


def aliases_of(path):
    """The names under which a file knows modules of the project."""
    found = {}
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if ours(alias.name):
                    found[alias.asname or alias.name.split(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


# ----------------------------------------------------------------------------------------------
# form


@pytest.mark.parametrize("words", ["format --check", "check"])
def test_ruff(words):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    command = [sys.executable, "-m", "ruff", *words.split(), "--no-cache", "."]
    command += ["--output-format=concise"]  # a line for each place, without the code around it
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, f"ruff {words} .\n{done.stdout}{done.stderr}"


def test_the_formatter_is_not_silenced():
    """`# fmt: off` stands around tables of data and is closed again; nothing else is excused."""
    broken = []
    for path in PROJECT + TESTS:
        off = 0
        for line, text in comments_of(path, r"fmt:|noqa"):
            if re.search(r"fmt:\s*skip", text):
                broken.append(f"{path}:{line} # fmt: skip")
            if "noqa" in text and not path.startswith("tests/"):
                broken.append(f"{path}:{line} # noqa")
            off += bool(re.search(r"fmt:\s*off", text)) - bool(re.search(r"fmt:\s*on", text))
        if off:
            broken.append(f"{path}: # fmt: off without # fmt: on")
    passed(broken)


# ----------------------------------------------------------------------------------------------
# imports


def test_no_import_of_ours_inside_a_function():
    """Only heavy or optional packages are imported where they are needed."""
    broken = []
    for path in PROJECT:
        for line, module, _, inside in imports_of(path):
            if inside and not f"{module}.".startswith(tuple(f"{name}." for name in LATE_IMPORTS)):
                broken.append(f"{path}:{line} imports {module} inside a function")
    passed(broken)


def test_imports_make_no_circle():
    graph = {
        name: sorted({module for _, module, *_ in imports_of(path) if module in MODULES})
        for name, path in MODULES.items()
    }
    done = set()

    def visit(name, way):
        if name in way:
            return [" -> ".join([*way[way.index(name) :], name])]
        if name in done:
            return []
        found = [circle for other in graph[name] for circle in visit(other, [*way, name])]
        done.add(name)
        return found

    passed([circle for name in graph for circle in visit(name, [])])


def test_nobody_imports_a_command():
    broken = []
    for name, path in MODULES.items():
        for line, module, *_ in imports_of(path):
            measures = name.startswith("bench.") and module in ("sft", "grpo")
            if module in COMMANDS and not measures:
                broken.append(f"{path}:{line} imports the command {module}")
    passed(broken)


def test_arrows_go_one_way():
    """The paper's concepts know nothing above them, and nothing but a benchmark knows bench/."""
    broken = []
    for name, path in MODULES.items():
        for line, module, *_ in imports_of(path):
            part, of = name.split(".")[0], module.split(".")[0]
            if part in CONCEPTS and ours(module) and of not in (*CONCEPTS, "kernels", "runtime"):
                broken.append(f"{path}:{line} imports {module}: a concept knows concepts alone")
            if of == "bench" and part != "bench":
                broken.append(f"{path}:{line} imports {module}: only bench/ measures")
    passed(broken)


def test_private_names_stay_at_home():
    """No module uses a _name that another one defines: what others use is public and documented."""
    defined = {}
    for path in PROJECT:
        for node in nodes_of(path):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name = node.name
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                name = node.id if isinstance(node, ast.Name) else node.attr
            else:
                continue
            if is_private(name):
                defined.setdefault(name, set()).add(path)
    broken = []
    for path in PROJECT:
        for line, module, names, _ in imports_of(path):
            if ours(module):
                broken += [f"{path}:{line} {module}.{name}" for name in names if is_private(name)]
        known = aliases_of(path)
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                base = getattr(node.value, "id", "")
                elsewhere = node.attr in defined and path not in defined[node.attr]
                if base in known or elsewhere and base not in ("self", "cls"):
                    broken.append(f"{path}:{node.lineno} {base or '…'}.{node.attr}")
    passed(broken)


def test_no_module_changes_the_names_of_another():
    broken = []
    for path in PROJECT:
        known = aliases_of(path)
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
                if getattr(node.value, "id", "") in known:
                    broken.append(f"{path}:{node.lineno} sets {node.value.id}.{node.attr}")
    passed(broken)


# ----------------------------------------------------------------------------------------------
# what is said and what is forbidden


def test_every_file_has_a_contract():
    broken = []
    for path in PROJECT:
        lines = len((ast.get_docstring(tree_of(path)) or "").splitlines())
        if lines < 4:
            broken.append(f"{path}:1 has a docstring of {lines} lines; at least 4")
    broken += [
        f"{path}:1 has no docstring" for path in TESTS if not ast.get_docstring(tree_of(path))
    ]
    passed(broken)


def test_the_papers_ideas_go_by_their_names():
    """No section numbers of the paper; docs/BAGEL.md §n is ours."""
    broken = []
    for path in PROJECT + TESTS:
        if path == HERE:
            continue
        for line, _ in prose_of(path, r"\b[Ss]ections? \d"):
            broken.append(f"{path}:{line} names a section of the paper")
        for line, text in prose_of(path, "§"):
            if "BAGEL" not in text:
                broken.append(f"{path}:{line} § without docs/BAGEL.md")
    passed(broken)


def test_one_word_for_one_thing():
    """A plan is an IC-CoT, a context is one of guidance: neither is a word of the layers below."""
    broken = []
    for path in PROJECT:
        if path.startswith("kernels/") or path in ("sequence.py", "model.py", "vision.py"):
            for node in nodes_of(path):
                name = getattr(node, "id", None) or getattr(node, "arg", None)
                name = name or getattr(node, "name", None) or getattr(node, "attr", None) or ""
                if isinstance(name, str) and name != "setup_context":  # PyTorch's name
                    for word in {"plan", "plans", "context", "contexts"} & set(name.split("_")):
                        broken.append(f"{path}:{node.lineno} {name}: {word} means something else")
    passed(sorted(set(broken)))


def test_nothing_forbidden():
    """No pickle, no broad handler, no assertion without a message, no unfinished business."""
    broken = []
    for path in PROJECT:
        for node in nodes_of(path):
            found = ""
            if isinstance(node, ast.Attribute):
                if getattr(node.value, "id", "") == "torch" and node.attr in ("load", "save"):
                    found = f"torch.{node.attr}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                found = "pickle" if "pickle" in names else ""
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found = "allow_pickle"
            elif isinstance(node, ast.ExceptHandler):
                kinds = ast.unparse(node.type) if node.type else ""
                if not kinds or re.search(r"\b(Base)?Exception\b", kinds):
                    found = f"except {kinds}".strip()
            elif isinstance(node, ast.Assert) and node.msg is None:
                found = "assert without a message"
            elif isinstance(node, ast.Name) and node.id == "NotImplementedError":
                found = node.id
            if found:
                broken.append(f"{path}:{node.lineno} {found}")
        for line, _ in prose_of(path, r"\b(TODO|FIXME|XXX)\b"):
            broken.append(f"{path}:{line} unfinished business")
    passed(broken)


def test_text_is_utf_8_whatever_the_locale():
    """Whoever opens a text file says so: runtime.files does, all others name the encoding."""
    broken = []
    for path in PROJECT:
        for node in nodes_of(path):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            opens = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            opens = opens and owner not in aliases_of(path)
            if name == "open" and isinstance(node.func, ast.Name):
                modes = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
                opens = not any("b" in getattr(mode, "value", "") for mode in modes)
            if opens and not any(keyword.arg == "encoding" for keyword in node.keywords):
                broken.append(f"{path}:{node.lineno} {name} without encoding")
    passed(broken)


def test_files_are_published_in_one_place():
    broken = []
    for path in PROJECT:
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and path != "runtime/files.py":
                name = f"{getattr(node.value, 'id', '')}.{node.attr}"
                if name in ("os.replace", "os.rename", "shutil.move"):
                    broken.append(f"{path}:{node.lineno} {name}: use runtime.files.published")
    passed(broken)


# ----------------------------------------------------------------------------------------------
# the layout


def test_the_top_holds_the_concepts_and_the_commands():
    names = (*CONCEPTS, "engine", "tree", "data", *COMMANDS)
    wanted = {*(f"{name}.py" for name in names), *PAPERS, *SETTINGS}
    kinds = {".py", ".md", ".toml", ".txt", ".ini", ".cfg", ".sh"}
    found = {path.name for path in ROOT.iterdir() if path.is_file()}
    passed(
        [f"{name} is missing" for name in sorted(wanted - found)]
        + [
            f"{name} does not belong at the top"
            for name in sorted(found - wanted)
            if Path(name).suffix in kinds and not name.startswith(".")
        ]
        + [f"{name}/ is missing" for name in FOLDERS if not (ROOT / name).is_dir()]
    )
