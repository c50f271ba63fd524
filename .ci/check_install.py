"""Check what is installed in this environment: `python check_install.py SOURCE` imports every module that SOURCE holds from the
environment, without nbdev or execnb, and asks every console script for --help, which no library may accompany by a warning."""
import importlib, subprocess, sys
from importlib.metadata import distribution
from pathlib import Path

source = Path(sys.argv[1])
sys.modules['nbdev'] = sys.modules['execnb'] = None  # importing either now fails

def module_name(path): return '.'.join(path.relative_to(source.parent).with_suffix('').parts).removesuffix('.__init__')

names = [module_name(o) for o in sorted(source.rglob('*.py'))]
for name in names:
    file = Path(importlib.import_module(name).__file__)
    assert Path(sys.prefix) in file.parents, f'{name} came from {file}, not from {sys.prefix}'
print(f'{len(names)} modules import')

scripts = [o for o in distribution('marsclr').entry_points if o.group == 'console_scripts']
assert scripts, 'the package has no console scripts'
for o in scripts:
    done = subprocess.run([Path(sys.prefix)/'bin'/o.name, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage:'), f'{o.name} --help: {done.stderr or done.stdout}'
    assert not done.stderr, f'{o.name} --help says on standard error: {done.stderr}'
    print(f'{o.name} --help')
