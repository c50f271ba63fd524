"What all tests share: no windows, a folder of their own to run in, and only tests of their own module."
import os
import sys

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ['no_proxy'] = os.environ['NO_PROXY'] = '127.0.0.1,nowhere.invalid'  # the stand-in is no matter of a proxy
if os.environ.get('MARSCLR_DATA'): os.environ['MARSCLR_DATA'] = os.path.abspath(os.environ['MARSCLR_DATA'])

import pytest


@pytest.fixture(scope='module', autouse=True)
def in_a_folder_of_its_own(tmp_path_factory):
    "Run each test module in an empty folder: no test may depend on where it is started."
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('cwd'))
    yield
    os.chdir(before)
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')


def pytest_pycollect_makeitem(collector, name, obj):
    "Leave alone what a test module imports, such as fastcore's `test_eq`."
    if name.lower().startswith('test') and getattr(obj, '__module__', None) != collector.module.__name__: return []
