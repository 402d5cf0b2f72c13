"""mnist.plugins: files of networks and data sets that the command did not bring."""

from pathlib import Path

import pytest

from mnist import plugins
from mnist.job import results
from mnist.job.options import Options


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig", "utf-8"])
def test_a_plugin_is_recorded_in_the_encoding_that_it_declares(
    tmp_path: Path, encoding: str
) -> None:
    text = f"# -*- coding: {encoding} -*-\n# réseau\n"
    file = tmp_path / "mine.py"
    file.write_text(text, encoding)
    plugins.load(file)
    origin = results.describe_origin(Options(import_=(file,)))
    assert origin["imports"] == {"mine.py": text}


def test_a_plugin_that_ends_or_is_no_python_is_refused_in_one_line(tmp_path: Path) -> None:
    for name, content, words in (
        ("exits.py", "\nraise SystemExit(3)", r"exits\.py, line 2: SystemExit: 3"),
        ("broken.py", "\nx = (", r"broken\.py.*: SyntaxError: "),
        ("text.txt", "", "is not a Python file"),
        ("compiled.pyc", "", "is not a Python file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(plugins.PluginError, match=words) as caught:
            plugins.load(tmp_path / name)
        assert "\n" not in str(caught.value)
