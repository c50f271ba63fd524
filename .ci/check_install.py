"""Check an installed copy: `python check_install.py SITE SOURCE` imports every module that SOURCE holds from SITE
without nbdev or execnb, and asks every console script for --help."""
import importlib, subprocess, sys
from importlib.metadata import distribution
from pathlib import Path

site, source = map(Path, sys.argv[1:])
sys.modules['nbdev'] = sys.modules['execnb'] = None  # importing either now fails

def module_name(path): return '.'.join(path.relative_to(source.parent).with_suffix('').parts).removesuffix('.__init__')

names = [module_name(o) for o in sorted(source.rglob('*.py'))]
for name in names:
    file = Path(importlib.import_module(name).__file__)
    assert site in file.parents, f'{name} came from {file}, not from {site}'
print(f'{len(names)} modules import')

scripts = [o for o in distribution('marsclr').entry_points if o.group == 'console_scripts']
assert scripts, 'the wheel has no console scripts'
for o in scripts:
    done = subprocess.run([sys.executable, site/'bin'/o.name, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage:'), f'{o.name} --help: {done.stderr or done.stdout}'
    print(f'{o.name} --help')
