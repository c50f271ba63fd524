"""Which backbones of timm can be trained, saved, loaded in plain timm, and taken apart into stages?

The smallest model of each family (as far as three names tell it), or with --every all of them,
with at most MOST million weights, with images of SIZE pixels, on a CPU. A line each, and a summary;
exit 1 where one that can be trained cannot be saved.

    python .ci/backbones.py [--every] [--size 64] [--most 10] [--seconds 600]
"""
import argparse
import contextlib
import io
import re
import sys
import time
import warnings

import timm
import torch

from marsclr.engine.encoders import ContrastiveModel, create_encoder, projection_head, width
from marsclr.engine.files import MarsclrError, one_line
from marsclr.engine.sizes import size_options, why_not
from marsclr.engine.stages import why_no_stages
from marsclr.engine.weights import check_savable


SMALL = re.compile(r'atto|femto|pico|nano|xx|tiny|lite|small|_ti|_xs|_s|_t|0|18|10|14|26|30|34|39|40|50|68')


def family(name): return re.match(r'[a-z]+', name)[0]


def weights_of(name):
    "How many weights a model has, in millions, without making them; infinity where that fails"
    try:
        with torch.device('meta'): model = timm.create_model(name, num_classes=0)
    except Exception: return float('inf')  # some models compute with what they make
    return sum(p.numel() for p in model.parameters())/1e6


def likely_size(name):
    "What a name says of a model's size: the number of its words that mean small, then its length"
    return -len(SMALL.findall(name)), len(name)


def smallest(most, tries=3):
    "The name and the millions of weights of the smallest model of each family, where it is small enough"
    families = {}
    for name in timm.list_models(exclude_filters='test_*'): families.setdefault(family(name), []).append(name)
    rows = []
    for names in families.values():
        likely = sorted(names, key=likely_size)[:tries]
        n, name = min((weights_of(name), name) for name in likely)
        if n <= most: rows.append((name, n))
    return sorted(rows)


def every(most):
    "The name and the millions of weights of all models that are small enough"
    rows = [(name, weights_of(name)) for name in timm.list_models(exclude_filters='test_*')]
    return [(name, n) for name, n in rows if n <= most]


def step(encoder, size):
    "One forward and backward pass of two images"
    model = ContrastiveModel(encoder.train(), projection_head(width(encoder)))
    model(torch.rand(2, 3, size, size)).square().sum().backward()


def look(name, size):
    "What a backbone can do: size, options of timm, what stops training or saving ('' if nothing does), stages"
    own = timm.get_pretrained_cfg(name).input_size[-1]
    options = size_options(name, size)
    encoder = create_encoder(name, **options)
    if why_not(encoder, size): size = own
    try: step(encoder, size)
    except Exception as e: return size, options, one_line(e), '', ''
    try: check_savable(encoder, name, options)
    except MarsclrError as e: return size, options, '', str(e), ''
    return size, options, '', '', why_no_stages(encoder, size)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--every', action='store_true', help='not only the smallest of each family')
    p.add_argument('--size', type=int, default=64)
    p.add_argument('--most', type=float, default=10)
    p.add_argument('--seconds', type=float, default=600)
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    began = time.monotonic()
    names = every(args.most) if args.every else smallest(args.most)
    rows = []
    for name, n in names:
        if time.monotonic() - began > args.seconds: break
        with contextlib.redirect_stdout(io.StringIO()): row = look(name, args.size)
        size, options, training, saving, stages = row
        told = ''.join(f' {k}={v}' for k, v in options.items())
        what = training and f'no step: {training}' or saving and f'not saved: {saving}' or stages or 'all'
        print(f'{name:40} {n:5.1f} M, {size} px{told}: {what}', flush=True)
        rows.append(row)
    def count(i): return sum(bool(row[i]) for row in rows)
    what = 'models' if args.every else 'families'
    print(f'timm {timm.__version__}: {len(rows)} of {len(names)} {what} tried in {time.monotonic()-began:.0f} s; '
          f'{sum(row[0] == args.size for row in rows)} take {args.size} px, '
          f'{sum(bool(row[1]) for row in rows)} of them with an option of timm; '
          f'not trained {count(2)}, not saved {count(3)}, no stages {count(4)}')
    sys.exit(bool(count(3)))


if __name__ == '__main__': main()
