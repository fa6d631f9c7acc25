"""The arrows of the house point one way, and this file reads them from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "gridmill"
FORBIDDEN_NAMES = {"utils", "common", "helpers", "schemas", "services", "managers", "constants", "types", "interfaces"}

# Which of our own packages each part may import. Top-level modules are parts of their own.
MAY_IMPORT = {
    "wire": {"wire"},
    "network": {"wire", "network", "settings_loader", ""},
    "node": {"wire", "node", "settings_loader", "demo", ""},
    "demo": {"demo"},
    "sim": {"wire", "network", "node", "sim"},
    "settings_loader": set(),
    "client": {"settings_loader"},
    "up": {"network", "wire", "client"},
    "operator_cli": {"network", "node", "client", "settings_loader"},
    "receipts_cli": {"operator_cli", "network", "node", "wire", "settings_loader"},
    "cli": {"operator_cli", "receipts_cli", "network", "node", "wire", "client", "up", "sim", "settings_loader", ""},
    "__main__": {"cli"},
    "__init__": set(),
}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{path}: say the whole module name"
            found.add(statement.module or "")
            found |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return found


def part_of(module: str) -> str:
    """The part of the house that a module of ours is in; "" for the package itself (its version)."""
    return module.split(".")[1] if module.count(".") else ""


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_every_part_imports_only_what_it_may() -> None:
    wrong = []
    for path in sources():
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert part in MAY_IMPORT, f"{part} is a new room: say in this test whom it may import"
        for module in imports_of(path):
            if not module.startswith("gridmill"):
                continue
            target = part_of(module)
            if target == "__version__":
                target = ""
            if target != part and target not in MAY_IMPORT[part]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert not wrong, wrong


def test_no_module_is_named_after_a_kind_of_file() -> None:
    wrong = [path for path in SOURCE.rglob("*") if path.stem in FORBIDDEN_NAMES]
    assert not wrong, wrong


def test_only_the_command_line_reads_the_environment() -> None:
    readers = [path.relative_to(SOURCE).as_posix() for path in sources() if "os.environ" in path.read_text()]
    # text_worker and up hand a cleaned environment to their children.
    assert set(readers) <= {"cli.py", "network/text.py"}, readers


def test_the_network_and_the_command_line_never_import_torch() -> None:
    program = (
        "import sys, pkgutil, importlib, gridmill.cli, gridmill.network\n"
        "gridmill.cli.build_parser()\n"
        "for found in pkgutil.walk_packages(gridmill.network.__path__, 'gridmill.network.'):\n"
        "    importlib.import_module(found.name)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'a heavy module was imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
