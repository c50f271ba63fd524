"Print the lowest version that settings.ini promises of each requirement, but for those named: `python lowest.py [NAME ...]`."
import configparser
import re
import sys
from pathlib import Path

config = configparser.ConfigParser()
config.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
requirements = config['DEFAULT']['requirements'].split()
bounds = [re.fullmatch(r'([\w-]+)>=([\d.]+)', o) for o in requirements]
for text, bound in zip(requirements, bounds):
    if not bound: sys.exit(f'settings.ini: {text} has no lower bound that can be tested')
    if bound[1] not in sys.argv[1:]: print(f'{bound[1]}=={bound[2]}')
