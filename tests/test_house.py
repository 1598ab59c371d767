"""The house rules, read from the source: each test is one rule and names whatever breaks it.

Project code is what stands at the top and in the folders beside it. Nothing is imported or run;
what ruff checks is left to ruff.
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CONCEPTS = ("sequence", "model", "vision", "flow", "iccot", "reward")
COMMANDS = ("sft", "grpo", "sample", "evaluate", "curate", "demo")
FOLDERS = ("kernels", "toy", "runtime", "studies", "bench")
PAPERS = ("README.md", "LOG.md", "RESULTS.md", "LICENSE", "CONTRIBUTING.md")
SETTINGS = ("pyproject.toml", "requirements.txt", "requirements-optional.txt")

FILES = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.py"))]
PROJECT = [path.relative_to(ROOT).as_posix() for path in sorted(FILES)]
TESTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("tests/**/*.py"))]

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
def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


@functools.cache
def nodes_of(path):
    return tuple(ast.walk(tree_of(path)))


def passed(broken):
    """Fail with one line for each place that breaks the rule."""
    assert not broken, "\n" + "\n".join(broken)


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_ours(module):
    return module in MODULES or module.split(".")[0] in FOLDERS


@functools.cache
def imports_of(path):
    """[(line, module, the name taken from it or "", the name it has here)] of all imports."""
    imports = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known_as = alias.asname or alias.name.split(".")[0]
                imports.append((node.lineno, alias.name, "", known_as))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module, name = f"{node.module}.{alias.name}", ""
                if module not in MODULES:
                    module, name = node.module, alias.name
                imports.append((node.lineno, module, name, alias.asname or alias.name))
    return imports


def aliases_of(path):
    """The names under which a file knows modules of the project."""
    return {
        known_as for _, module, name, known_as in imports_of(path) if is_ours(module) and not name
    }


# ----------------------------------------------------------------------------------------------
# imports


def test_no_import_of_ours_inside_a_function():
    """Only heavy or optional packages are imported where they are needed."""
    broken = []
    for path in PROJECT:
        at_the_top = {node.lineno for node in tree_of(path).body}
        at_the_top |= {  # an optional package, with what is done without it
            part.lineno
            for node in tree_of(path).body
            if isinstance(node, (ast.Try, ast.If))
            for part in ast.walk(node)
            if isinstance(part, (ast.Import, ast.ImportFrom))
        }
        for line, module, *_ in imports_of(path):
            late = f"{module}.".startswith(tuple(f"{name}." for name in LATE_IMPORTS))
            if line not in at_the_top and not late:
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
        circles = [circle for other in graph[name] for circle in visit(other, [*way, name])]
        done.add(name)
        return circles

    passed([circle for name in graph for circle in visit(name, [])])


def test_arrows_go_one_way():
    """The paper's concepts know nothing above them; nobody imports a command, but that bench/
    measures training; and nothing else knows bench/."""
    broken = []
    for name, path in MODULES.items():
        for line, module, *_ in imports_of(path):
            part, of = name.split(".")[0], module.split(".")[0]
            if part in CONCEPTS and is_ours(module) and of not in (*CONCEPTS, "kernels", "runtime"):
                broken.append(f"{path}:{line} imports {module}: a concept knows concepts alone")
            if of == "bench" and part != "bench":
                broken.append(f"{path}:{line} imports {module}: only bench/ measures")
            if module in COMMANDS and part != "bench":
                broken.append(f"{path}:{line} imports the command {module}")
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
        for line, module, name, _ in imports_of(path):
            if is_ours(module) and is_private(name):
                broken.append(f"{path}:{line} {module}.{name}")
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                base = getattr(node.value, "id", "")
                elsewhere = node.attr in defined and path not in defined[node.attr]
                if base in aliases_of(path) or elsewhere and base not in ("self", "cls"):
                    broken.append(f"{path}:{node.lineno} {base or '…'}.{node.attr}")
    passed(broken)


def test_no_module_changes_the_names_of_another():
    broken = []
    for path in PROJECT:
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
                if getattr(node.value, "id", "") in aliases_of(path):
                    broken.append(f"{path}:{node.lineno} sets {node.value.id}.{node.attr}")
    passed(broken)


# ----------------------------------------------------------------------------------------------
# what is said and what is forbidden


def test_every_file_has_a_contract():
    lines = {path: (ast.get_docstring(tree_of(path)) or "").splitlines() for path in PROJECT}
    passed(
        [
            f"{path} has a docstring of {len(docstring)} lines; at least 4"
            for path, docstring in lines.items()
            if len(docstring) < 4
        ]
        + [f"{path} has no docstring" for path in TESTS if not ast.get_docstring(tree_of(path))]
    )


def what_is_forbidden(node):
    """Its name, if a node is one of these; else ""."""
    if isinstance(node, ast.Attribute):
        base = getattr(node.value, "id", "")
        if base == "torch" and node.attr in ("load", "save"):
            return f"torch.{node.attr}"
        return f"{base}.{node.attr}" if f"{base}.{node.attr}" in MOVES else ""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
        return "pickle" if "pickle" in names else ""
    if isinstance(node, ast.keyword):
        return "allow_pickle" if node.arg == "allow_pickle" else ""
    if isinstance(node, ast.ExceptHandler):
        kinds = ast.unparse(node.type) if node.type else ""
        broad = not kinds or re.search(r"\b(Base)?Exception\b", kinds)
        return f"except {kinds}" if broad else ""
    if isinstance(node, ast.Assert) and node.msg is None:
        return "assert without a message"
    return "NotImplementedError" if getattr(node, "id", "") == "NotImplementedError" else ""


MOVES = ("os.replace", "os.rename", "shutil.move")  # runtime/files.py alone publishes


def test_nothing_forbidden():
    """No pickle, no broad handler, no assertion without a message, no unfinished business."""
    broken = []
    for path in PROJECT:
        for node in nodes_of(path):
            forbidden = what_is_forbidden(node)
            if forbidden and not (forbidden in MOVES and path == "runtime/files.py"):
                broken.append(f"{path}:{node.lineno} {forbidden}")
        text = (ROOT / path).read_text(encoding="utf-8")
        for word in re.findall(r"\b(TODO|FIXME|XXX|noqa|fmt: skip)\b", text):
            broken.append(f"{path} {word}")
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


# ----------------------------------------------------------------------------------------------
# the layout


def test_the_top_holds_the_concepts_and_the_commands():
    names = (*CONCEPTS, "engine", "tree", "data", *COMMANDS)
    wanted = {*(f"{name}.py" for name in names), *PAPERS, *SETTINGS}
    kinds = {".py", ".md", ".toml", ".txt", ".ini", ".cfg", ".sh"}
    there = {path.name for path in ROOT.iterdir() if path.is_file() and path.suffix in kinds}
    there = {name for name in there if not name.startswith(".")}
    passed(
        [f"{name} is missing" for name in sorted(wanted - there - {"LICENSE"})]
        + [f"{name} does not belong at the top" for name in sorted(there - wanted)]
        + [f"{name}/ is missing" for name in FOLDERS if not (ROOT / name).is_dir()]
    )
