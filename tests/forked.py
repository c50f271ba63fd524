"Commands as processes of their own that need not import torch again: a server imports it once, and each process is a copy of it."
import multiprocessing
import os
import sys
from importlib.metadata import entry_points

import torch

scripts = {o.name: o for o in entry_points(group='console_scripts') if o.name.startswith('marsclr_')}
forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload(sorted({o.module for o in scripts.values()}))  # the server is one for all test modules


def work(line, folder, out, env):
    "What the script does"
    for fd, name in ((1, 'stdout'), (2, 'stderr')): os.dup2(os.open(out/name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    os.chdir(folder)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = list(map(str, line))
    sys.exit(scripts[sys.argv[0]].load()())


class Script:
    "A console script on its way, as far as the tests need it"
    def __init__(self, line, out, folder='.', env={}):
        self.out, self.process = out, forks.Process(target=work, args=(line, folder, out, env), daemon=True)
        out.mkdir(exist_ok=True)
        self.process.start()

    def poll(self): return self.process.exitcode
    def kill(self): self.process.kill()
    def send_signal(self, number): os.kill(self.process.pid, number)

    def communicate(self, timeout=120):
        "Exit status, standard output and standard error"
        self.process.join(timeout)
        if self.poll() is None: self.kill()
        return self.poll(), (self.out/'stdout').read_text(), (self.out/'stderr').read_text()
