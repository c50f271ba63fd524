"""Check what is installed in this environment: `python check_install.py SOURCE`.

Every module that SOURCE holds is imported from the environment, without nbdev or execnb, and nothing may be said on standard error.
Every console script is there, and answers `--help`, which no library may accompany by a warning. The first script is started as users
start it; the others are called in copies of this process, which has imported everything, so that nine imports of torch become two.
"""
import contextlib
import importlib
import io
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

bin_folder = Path(sys.executable).parent


def module_name(path, source):
    return '.'.join(path.relative_to(source.parent).with_suffix('').parts).removesuffix('.__init__')


def import_all(source):
    "Import the modules that `source` holds, each from this environment, in silence"
    sys.modules['nbdev'] = sys.modules['execnb'] = None  # importing either now fails
    names = [module_name(path, source) for path in sorted(source.rglob('*.py'))]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for name in names:
            file = Path(importlib.import_module(name).__file__)
            assert Path(sys.prefix) in file.parents, f'{name} came from {file}, not from {sys.prefix}'
    assert not said.getvalue(), f'importing says on standard error: {said.getvalue()}'
    print(f'{len(names)} modules import')


def started(script):
    "Exit status, standard output and standard error of a script that is started as users start it"
    done = subprocess.run([bin_folder/script.name, '--help'], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def called(script):
    "The same of a script that is called in a copy of this process"
    files = [Path(f'{script.name}.{stream}') for stream in ('out', 'err')]
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, 1): os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv = [script.name, '--help']
        status = 0
        try: script.load()()
        except SystemExit as stop: status = stop.code or 0
        except BaseException as error: status = repr(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    _, status = os.waitpid(child, 0)
    out, err = [file.read_text() for file in files]
    for file in files: file.unlink()
    return os.waitstatus_to_exitcode(status), out, err


def check_scripts():
    scripts = [point for point in distribution('marsclr').entry_points if point.group == 'console_scripts']
    assert scripts, 'the package has no console scripts'
    for number, script in enumerate(scripts):
        assert os.access(bin_folder/script.name, os.X_OK), f'{script.name} is not installed'
        status, out, err = (started if number == 0 else called)(script)
        assert status == 0 and out.startswith('usage:'), f'{script.name} --help: {err or out}'
        assert not err, f'{script.name} --help says on standard error: {err}'
        print(f'{script.name} --help')


if __name__ == '__main__':
    import_all(Path(sys.argv[1]))
    sys.stdout.flush()
    check_scripts()
