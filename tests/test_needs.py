"""What is missing is told in one line: by an old Python, and without the packages."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from support import DEADLINE_S, ROOT, SERVER_FILE
from support_process import ENVIRONMENT

OLD = """
import sys
sys.version_info, sys.version = (3, 8, 18), "3.8.18 (old)"
sys.modules["__main__"].__file__ = {main!r}
import karna_ws
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=DEADLINE_S, check=False,
    )  # fmt: skip


def test_old_python_reads_what_tells_it_so() -> None:
    for path in (SERVER_FILE, ROOT / "karna" / "needs.py", ROOT / "karna" / "__init__.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
    body = ast.parse(SERVER_FILE.read_text()).body
    imports = [each for each in body if isinstance(each, ast.Import | ast.ImportFrom)]
    first = next(
        each for each in imports if ast.unparse(each) != "from __future__ import annotations"
    )
    assert ast.unparse(first) == "import karna.needs", "what others import may be too new"


def test_old_python_is_told_which_one_is_needed() -> None:
    done = run("-c", OLD.format(main="karna_ws.py"))
    told = "Python 3.11 or later is needed, and this is 3.8.18"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"karna_ws: {told}\n")
    embedding = run("-c", OLD.format(main="program.py"))
    assert embedding.returncode == 1 and embedding.stderr.endswith(f"ImportError: {told}\n")


def test_missing_package_is_told_with_the_command_that_installs_it() -> None:
    done = run("-S", str(SERVER_FILE))  # without site, and so without site-packages
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("karna_ws: No module named 'orjson': install it with `")
    assert done.stderr.endswith(" -m pip install -r requirements.txt`\n")


@pytest.mark.parametrize("name", ["orjson", "websockets"])
def test_each_package_is_looked_for(name: str) -> None:
    done = run("-c", f"import sys; sys.modules[{name!r}] = None; import karna_ws")
    assert (
        done.stderr.rstrip().endswith("-m pip install -r requirements.txt`") and name in done.stderr
    )
