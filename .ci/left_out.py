"""Name the notebooks that have cells which the pytest modules do not run: `python left_out.py`, as a pattern for `nbdev_test --file_re`.

A pytest module ends with the last section that checks something; the cells behind it are run by nbdev_test alone.
"""
import re
from pathlib import Path

import nbformat

from notebook_tests import merge, read_sections


def left_out(path):
    "Does the notebook have cells, for any machine, that are in no test?"
    _, sections = read_sections(nbformat.read(path, 4))
    kept = [source for section in merge(sections) for source in section.srcs]
    return any(source not in kept for section in sections if not section.real for source in section.srcs)


if __name__ == '__main__':
    folder = Path(__file__).resolve().parent.parent/'nbs'
    names = [path.name for path in sorted(folder.rglob('*.ipynb')) if not path.name.startswith('.') and left_out(path)]
    print(f"^({'|'.join(map(re.escape, names))})$")
