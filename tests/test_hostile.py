"A thousand bad files, and a process that is killed again and again: nothing crashes or hangs, and each file is in the table or in the quarantine."
import io
import json
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastcore.test import expect_fail
from forked import forks
from PIL import Image

from marsclr.engine import pack_writer, reading
from marsclr.engine.files import MarsclrError
from marsclr.datasets import find_images, image_folder, msl, rovers
from marsclr.archives.marsyard import write_marsyard
from marsclr.engine.packing import load_pack, marsclr_pack, pack_archive
from marsclr.engine.pixels import _retagged
from marsclr.engine.reading import Reading, decode, read_image


def job(function, *args):
    process = forks.Process(target=function, args=args, daemon=True)
    process.start()
    return process


PACK = """from pathlib import Path
from marsclr.datasets import image_folder
from marsclr.engine.packing import pack_archive
from marsclr.engine.reading import Reading
pack_archive(image_folder({root!r}), {to!r}, size={size}, workers=2, reading=Reading(tiles={tiles}))
Path({peak!r}).write_text(next(o.split()[1] for o in open('/proc/self/status') if o.startswith('VmHWM')))"""


def pack_folder(root, to, size=32, tiles=False):
    "Peak memory in MiB of a process that packs it, and that knows nothing of the tests"
    peak = to.with_suffix('.peak')
    process = job(exec, PACK.format(root=str(root), to=str(to), peak=str(peak), size=size, tiles=tiles))
    process.join(120)
    if process.exitcode is None: process.kill()
    assert process.exitcode == 0
    return int(peak.read_text())/1024


# --- a thousand files

def saved(image, kind, **kwargs):
    out = io.BytesIO()
    image.save(out, kind, **kwargs)
    return out.getvalue()


def exif(turn):
    tags = Image.Exif()
    tags[0x0112] = turn
    return tags


def scene(rng, mode='RGB'):
    "Four colours, one a quarter, of odd sizes: whoever turns it, or takes another channel for red, is found out"
    image = Image.fromarray(rng.integers(40, 216, (2, 2, 3), dtype=np.uint8)).resize((2*int(rng.integers(20, 60)), 2*int(rng.integers(20, 60))), Image.Resampling.NEAREST)
    return image.convert(mode)


def half(image):
    image.putalpha(Image.linear_gradient('L').resize(image.size))
    return image


def sixteen(image): return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16)*257)


GOOD = {  # what must be read, each from a scene
    'cmyk.jpg': lambda o: saved(o.convert('CMYK'), 'JPEG'), 'grey.jpg': lambda o: saved(o.convert('L'), 'JPEG'),
    'progressive.jpg': lambda o: saved(o, 'JPEG', progressive=True), 'wrong-suffix.tif': lambda o: saved(o, 'PNG'),
    'turned.jpg': lambda o: saved(o.transpose(Image.Transpose.ROTATE_90), 'JPEG', exif=exif(6)),
    '16-bit.png': lambda o: saved(sixteen(o), 'PNG'), '16-bit.tif': lambda o: saved(sixteen(o), 'TIFF'),
    'palette.png': lambda o: saved(o.quantize(8), 'PNG'), 'palette-hole.png': lambda o: saved(o.quantize(8), 'PNG', transparency=0),
    'alpha.png': lambda o: saved(half(o), 'PNG'), 'grey-alpha.png': lambda o: saved(half(o.convert('L')), 'PNG'), 'alpha.webp': lambda o: saved(half(o), 'WEBP', method=0),
    'animated.gif': lambda o: saved(o, 'GIF', save_all=True, append_images=[o.rotate(90)]), 'animated.png': lambda o: saved(o, 'PNG', save_all=True, append_images=[o.rotate(90)]),
    'bits.bmp': lambda o: saved(o.convert('1'), 'BMP'), 'lzw.tif': lambda o: saved(o, 'TIFF', compression='tiff_lzw'),
    'narrow.png': lambda o: saved(o.crop((0, 0, 1, o.height)), 'PNG'), 'flat.jpg': lambda o: saved(o.crop((0, 0, o.width, 1)), 'JPEG'), 'dot.gif': lambda o: saved(o.crop((0, 0, 1, 1)), 'GIF')}


def claim(data, old, new):
    "The same file, whose header claims another size"
    assert old in data
    return data.replace(old, new, 1)


def png_bomb(image, side=40000):
    head = b'IHDR' + struct.pack('>IIBBBBB', side, side, 8, 6, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + head + struct.pack('>I', zlib.crc32(head)) + saved(image, 'PNG')[33:]


def jpeg_bomb(image): return claim(saved(image, 'JPEG'), struct.pack('>BHH', 8, image.height, image.width), struct.pack('>BHH', 8, 65000, 65000))


def tiff_bomb(image):
    def tag(n, value): return struct.pack('<HHII', n, 4, 1, value)
    data = saved(image, 'TIFF')
    for n, value, new in ((256, image.width, 40000), (257, image.height, 40000), (278, image.height, 40000)): data = claim(data, tag(n, value), tag(n, new))
    return data


def bmp_bomb(image): return claim(saved(image, 'BMP'), struct.pack('<ii', *image.size), struct.pack('<ii', 40000, 30000))
def gif_bomb(image): return claim(saved(image, 'GIF'), struct.pack('<HH', *image.size), struct.pack('<HH', 65535, 65535))


BAD = {  # what cannot be read
    'truncated.jpg': lambda o: saved(o, 'JPEG')[:-30], 'truncated.png': lambda o: saved(half(o), 'PNG')[:-40], 'empty.jpg': lambda o: b'', 'zeros.png': lambda o: bytes(500),
    'page.jpg': lambda o: b'<!DOCTYPE html><title>404</title>', 'script.jpg': lambda o: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n',
    'document.png': lambda o: saved(o, 'PDF'), 'other.jpg': lambda o: saved(o, 'TGA'), '32-bit.tif': lambda o: saved(o.convert('F'), 'TIFF'),
    'bomb.png': png_bomb, 'smaller-bomb.png': lambda o: png_bomb(o, 6000), 'bomb.jpg': jpeg_bomb, 'bomb.tif': tiff_bomb, 'bomb.bmp': bmp_bomb, 'bomb.gif': gif_bomb}


SPECIAL = {'pipe.jpg': os.mkfifo, 'folder.jpg': os.mkdir, 'itself.jpg': lambda o: os.symlink(o, o), 'gone.jpg': lambda o: os.symlink('nobody.jpg', o),
           'endless.jpg': lambda o: os.symlink('/dev/zero', o), 'socket.jpg': lambda o: os.mknod(o, 0o140666)}
NAMES = [b'comma, "quote" \'.jpg', b'line\nend.jpg', b'return\r.jpg', b'both\r\n.jpg', b'caf\xe9.jpg', b' space .jpg', b'NA.jpg', b'-1.jpg', b'tab\t;.jpg', b'back\\n.jpg', b'\xff\xfe.jpg']


def flipped(data, rng):
    "With up to 20 bytes changed, anywhere; or cut, or with a part repeated"
    data = bytearray(data)
    for _ in range(rng.integers(1, 20)): data[rng.integers(len(data))] = rng.integers(256)
    a, b = sorted(rng.integers(len(data), size=2))
    return bytes([data, data[:b], data[:b]+data[a:]][rng.choice(3, p=[.8, .1, .1])])


def real_images(folder):
    archive = rovers() if os.environ.get('MARSCLR_DATA') else msl(write_marsyard(folder/'yard', n=60, size=96))
    return [(archive.root/p).read_bytes() for p in archive.table.path[::max(1, len(archive)//60)]]


def write_hostile(folder, n=1000, seed=0):
    rng, kinds = np.random.default_rng(seed), {**GOOD, **BAD}
    real = real_images(folder)
    root = folder/'hostile'
    root.mkdir()
    for name, make in SPECIAL.items(): make(root/name)
    for name in NAMES: (root/os.fsdecode(name)).write_bytes(saved(scene(rng), 'JPEG'))
    (root/'loop').symlink_to(root)
    for i in range(n//2 - len(SPECIAL) - len(NAMES)):
        name = list(kinds)[i % len(kinds)]
        (root/f'{i}-{name}').write_bytes(kinds[name](scene(rng)))
    for i in range(n - n//2):
        data = real[i % len(real)] if i % 3 else GOOD[list(GOOD)[i % len(GOOD)]](scene(rng))
        (root/f'flipped-{i}.jpg').write_bytes(flipped(data, rng))
    return root


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "The folder, its pack, what is in quarantine and why, and the peak memory of the process that packed it"
    folder = tmp_path_factory.mktemp('hostile')
    root = write_hostile(folder)
    memory = pack_folder(root, folder/'pack')
    quarantine = pd.read_csv(folder/'pack'/'quarantine.csv', encoding_errors='surrogateescape', keep_default_na=False)
    return root, load_pack(folder/'pack'), dict(zip(quarantine.path, quarantine.reason)), memory


def test_a_thousand_bad_files_are_all_accounted_for(packed):
    root, pack, quarantine, memory = packed
    there = sorted(os.fsdecode(o) for o in os.listdir(os.fsencode(root)))
    assert sorted([*pack.table.path, *quarantine]) == [o for o in there if o != 'loop'] and len(there) == 1001
    assert all(quarantine.values()) and all(o.isascii() and len(o.splitlines()) == 1 for o in quarantine.values())
    assert not any(' at 0x' in o or str(root) in o for o in quarantine.values())
    assert memory < 1024


def test_each_kind_has_the_fate_it_should(packed):
    root, pack, quarantine, _ = packed
    read = set(pack.table.path)
    assert {os.fsdecode(o) for o in NAMES} <= read and set(SPECIAL) <= set(quarantine)
    for path in read | set(quarantine):
        kind = path.partition('-')[2]
        if kind in GOOD and path[0].isdigit(): assert path in read, (path, quarantine[path])
        if kind in BAD and path[0].isdigit(): assert path in quarantine, path
    assert sum(o.startswith('flipped') for o in read) > 50 and sum(o.startswith('flipped') for o in quarantine) > 50


@pytest.mark.parametrize('kind', sorted(set(GOOD) - {'narrow.png', 'flat.jpg', 'dot.gif', 'bits.bmp', 'palette-hole.png'}))
def test_what_is_read_is_read_right(kind):
    image = scene(np.random.default_rng(5))
    expected = decode(saved(image, 'PNG'), 32).astype(float)
    if '16-bit' in kind or 'grey' in kind: expected[:] = np.asarray(Image.fromarray(expected.astype(np.uint8)).convert('L'))[..., None]
    if 'alpha' in kind: expected *= np.asarray(Image.linear_gradient('L').resize(image.size).crop(((image.width-min(image.size))//2, (image.height-min(image.size))//2, (image.width+min(image.size))//2, (image.height+min(image.size))//2)).resize((32, 32)))[..., None]/255
    assert np.abs(decode(GOOD[kind](image.copy()), 32, Reading((0, 65535))) - expected).mean() < 6


def test_a_big_endian_tiff_of_16_bits_is_no_brighter():
    values, tags = np.arange(0, 65536, 64, dtype='>u2').reshape(32, 32), []
    for n, value in ((256, 32), (257, 32), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 32), (279, 2048)): tags.append(struct.pack('>HHIHH', n, 3, 1, value, 0))
    data = b'MM\0*' + struct.pack('>I', 8+2048) + values.tobytes() + struct.pack('>H', len(tags)) + b''.join(tags) + bytes(4)
    assert (decode(data, 32, Reading((0, 65535))) == np.round(values/257)[..., None]).all()


def tiff(pixels, order='<', **tags):
    "An uncompressed TIFF by hand: (H, W, C) numbers of any kind, in one strip"
    kind = {'u': 1, 'i': 2, 'f': 3}[pixels.dtype.kind]
    pixels, (height, width, channels) = pixels.astype(pixels.dtype.newbyteorder(order)), pixels.shape
    new = {256: [width], 257: [height], 258: [8*pixels.itemsize]*channels, 259: [1], 262: [1], 277: [channels], 278: [height], 273: [8], 279: [pixels.nbytes], 339: [kind]*channels}
    return _retagged(bytes(8) + pixels.tobytes(), order, new | {int(k[1:]): v for k, v in tags.items()})


@pytest.mark.parametrize('kind', ['uint16', 'int16', 'uint32', 'int32', 'float32', 'float64'])
@pytest.mark.parametrize('order', '<>')
def test_numbers_of_every_kind_are_scaled_alike(kind, order):
    values = np.random.default_rng(0).integers(1000, 1400, (32, 32, 1)).astype(kind)
    by_hand = np.floor((values.astype(float)-1000)/400*255 + .5)
    assert (decode(tiff(values, order), 32, Reading((1000, 1400))) == by_hand).all() and len(np.unique(by_hand)) > 200


def test_negative_numbers_and_missing_ones():
    values = np.array([[-500, 0, 500, -9999]]*4, np.int16)[..., None]
    assert decode(tiff(values), 4, Reading((-500, 500)))[0, :, 0].tolist() == [0, 128, 255, 0]
    nan = np.where(values == -9999, np.nan, values).astype(np.float32)
    assert decode(tiff(nan), 4, Reading((-500, 500)))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_one_range_for_a_folder_of_12_bits(tmp_path, capsys):
    (tmp_path/'in').mkdir()
    frames = [(1000 + 400*gain*np.random.default_rng(i).random((32, 32))).astype(np.uint16) for i, gain in enumerate((.5, .75, 1, 1))]
    for i, o in enumerate(frames): (tmp_path/'in'/f'{i}.png').write_bytes(saved(Image.fromarray(o), 'PNG'))
    pack = pack_archive(image_folder(tmp_path/'in'), tmp_path/'pack', 32)
    low, high = json.loads((tmp_path/'pack'/'pack.json').read_text())['range']
    assert 1000 <= low < 1005 and 1390 < high < 1400 and f'{low:g} becomes black and {high:g} white' in capsys.readouterr().out
    by_hand = np.floor(np.clip((np.stack(frames)-low)/(high-low), 0, 1)*255 + .5)
    assert (pack[range(4)].numpy() == by_hand[..., None]).all() and len(np.unique(by_hand)) >= 200
    given = pack_archive(image_folder(tmp_path/'in'), tmp_path/'given', 32, reading=Reading((0, 65535)))
    assert len(np.unique(given[range(4)])) == 2 and 'warning: 2 greys are few' in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_its_range_and_another_range_starts_anew(tmp_path, capsys):
    (tmp_path/'in').mkdir()
    for i in range(6): (tmp_path/'in'/f'{i}.png').write_bytes(saved(Image.fromarray(np.full((32, 32), 1000 + 10*i, np.uint16)), 'PNG'))
    archive, part = image_folder(tmp_path/'in'), tmp_path/'.pack-partial'
    whole = pack_archive(archive, tmp_path/'whole', 32)
    for asked, kept in ((Reading(), True), (Reading((0, 2000)), False)):
        part.mkdir()
        for name, data in contents(tmp_path/'whole').items(): (part/name).write_bytes(data[:300] if name == 'table.csv' else data)
        (part/'pack.json').unlink()
        found = dict(range=[1000, 1050], pixels='integer', images=6, levels=6)
        (part/'reading.json').write_text(json.dumps(dict(asked=dict(asdict(Reading()), value_range=[], bands=[]), found=found)))
        pack = pack_archive(archive, tmp_path/'pack', 32, reading=asked)
        assert ('going on after' in capsys.readouterr().out) == kept
        assert (np.load(tmp_path/'pack'/'images.npy') == np.load(tmp_path/'whole'/'images.npy')).all() == kept
        shutil.rmtree(tmp_path/'pack')


@pytest.mark.parametrize('bands', [4, 5, 13])
def test_a_tiff_of_many_bands_says_so_and_gives_those_that_are_asked_for(bands, tmp_path):
    values = np.random.default_rng(0).integers(0, 4000, (32, 32, bands), dtype=np.uint16)
    (tmp_path/'a.tif').write_bytes(tiff(values))
    assert read_image(tmp_path/'a.tif', 32)[2] == f'ValueError: a TIFF of {bands} bands, uint16: say which are red, green and blue, as in --bands 3,2,1'
    chosen = decode(tiff(values), 32, Reading((0, 4000), bands=(3, 2, 1)))
    assert (chosen == np.floor(values[..., [2, 1, 0]]/4000*255 + .5)).all()
    eight = (values//16).astype(np.uint8)
    assert (decode(tiff(eight), 32, Reading(bands=(2,))) == eight[..., [1]]).all()
    assert 'there is no band 14' in read_image(tmp_path/'a.tif', 32, Reading((0, 1), bands=(14,)))[2]


def test_colours_of_16_bits_keep_both_bytes(tmp_path):
    values = np.random.default_rng(0).integers(1000, 1400, (3, 32, 32), dtype=np.uint16)
    by_hand = np.floor((values.transpose(1, 2, 0)-1000)/400*255 + .5)
    planar = tiff(values.transpose(1, 2, 0).copy(), t262=[2], t284=[2], t273=[8, 8+2048, 8+4096], t279=[2048]*3)
    planar = planar[:8] + values.tobytes() + planar[8+values.nbytes:]
    for file in (planar, tiff(values.transpose(1, 2, 0).copy(), t262=[2])): assert (decode(file, 32, Reading((1000, 1400))) == by_hand).all()


@pytest.mark.parametrize('image, kind, options', [(Image.new('RGB', (4700, 4700)), 'PNG', dict(compress_level=1, transparency=(1, 2, 3))),
                                                  (Image.new('RGB', (3600, 3600)), 'WEBP', dict(method=0)), (Image.new('RGB', (9000, 9000)), 'JPEG', {})])
def test_the_largest_images_that_are_read_fit_into_memory(image, kind, options, tmp_path):
    (tmp_path/'in').mkdir()
    for i in range(4): (tmp_path/'in'/f'{i}.png').write_bytes(saved(image, kind, **options)) if not i else os.link(tmp_path/'in'/'0.png', tmp_path/'in'/f'{i}.png')
    assert pack_folder(tmp_path/'in', tmp_path/'pack') < 1024
    assert len(load_pack(tmp_path/'pack')) == 4


def write_large(folder):
    "What cameras and orbiters make, 8 and 16 bits"
    folder.mkdir()
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 6000, dtype=np.uint8), (4000, 1)))
    grey.save(folder/'24mp-grey.png', compress_level=1)
    grey.convert('RGB').save(folder/'24mp-rgb.tif', compression='tiff_lzw')
    grey.resize((9000, 5400)).convert('RGB').save(folder/'48mp-progressive.jpg', quality=60, progressive=True)
    grey.resize((4200, 3200)).convert('RGB').save(folder/'13mp.webp', quality=50, method=0)
    Image.fromarray(np.tile(np.linspace(0, 255, 2048, dtype=np.uint8), (20000, 1))).save(folder/'strip.png', compress_level=1)
    (folder/'24mp-16-bit.tif').write_bytes(tiff(np.tile(np.linspace(0, 4000, 6000, dtype=np.uint16)[:, None], (4000, 1, 3)), t262=[2]))


def test_large_images_are_packed_and_take_less_than_2_gib(tmp_path):
    write_large(tmp_path/'in')
    assert pack_folder(tmp_path/'in', tmp_path/'pack') < 2048
    assert len(load_pack(tmp_path/'pack')) == 6
    gradient = np.linspace(0, 255, 6000)[1000:5000].reshape(32, 125).mean(1)
    pack = load_pack(tmp_path/'pack')
    for name in ('24mp-grey.png', '24mp-rgb.tif', '24mp-16-bit.tif'):
        assert np.abs(pack[pack.table.path.tolist().index(name)][16, :, 0].numpy() - gradient).max() < 3, name


def test_large_images_are_cut_into_tiles_and_take_less_than_2_gib(tmp_path):
    write_large(tmp_path/'in')
    for name in ('24mp-rgb.tif', '13mp.webp'): (tmp_path/'in'/name).unlink()
    assert pack_folder(tmp_path/'in', tmp_path/'pack', 192, True) < 2048
    pack = load_pack(tmp_path/'pack')
    assert pack.table.groupby('path').size().to_dict() == {'24mp-16-bit.tif': 672, '24mp-grey.png': 672, '48mp-progressive.jpg': 1363, 'strip.png': 1155}
    strip = pack.table[pack.table.path == 'strip.png']
    assert (strip.x.max(), strip.y.max()) == (2048-192, 20000-192)
    first = pack[strip.index[0]].numpy()[..., 0]
    assert (first == np.linspace(0, 255, 2048, dtype=np.uint8)[:192]).all()


def deflate_bomb(width, height, bits, colour, row_bytes):
    "A sound PNG of zeros, a thousand times smaller than what it unfolds to"
    def chunk(name, data): return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name+data))
    squeeze, row = zlib.compressobj(9), bytes((1+row_bytes)*100)
    data = b''.join([squeeze.compress(row) for _ in range(height//100)] + [squeeze.flush()])
    head = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', data) + chunk(b'IEND', b'')


BOMBS = {'1-bit.png': (lambda: deflate_bomb(13000, 13000, 1, 0, 1625), 'no image is compressed as much'),
         'huge.png': (lambda: deflate_bomb(40000, 10000, 8, 0, 40000), 'raise --max_megapixels'),
         '8-bit.png': (lambda: deflate_bomb(13300, 13300, 1, 3, 1663), 'no image is compressed as much'),
         '16-bit.tif': (lambda: claim(tiff(np.zeros((8, 8, 1), np.uint16)), struct.pack('<HHII', 257, 4, 1, 8), struct.pack('<HHII', 257, 4, 1, 2_000_000)), 'no image is compressed as much'),
         'tile.tif': (lambda: tiff(np.zeros((8, 8, 1), np.uint16), t322=[2**30], t323=[8], t324=[8], t325=[128]), 'tiles are larger than the image')}


def test_bombs_are_refused_before_they_unfold(tmp_path):
    (tmp_path/'in').mkdir()
    for name, (make, _) in BOMBS.items(): (tmp_path/'in'/name).write_bytes(make())
    (tmp_path/'in'/'sound.jpg').write_bytes(saved(Image.new('RGB', (40, 40)), 'JPEG'))
    assert pack_folder(tmp_path/'in', tmp_path/'pack') < 700
    quarantine = pd.read_csv(tmp_path/'pack'/'quarantine.csv').set_index('path').reason
    for name, (_, reason) in BOMBS.items(): assert reason in quarantine[name], name


def test_what_cannot_be_held_is_refused_with_what_it_would_take(monkeypatch):
    monkeypatch.setattr(reading.pixel_memory, 'most', lambda: 2**28)
    with expect_fail(ValueError, '6000 x 4000 pixels: would take 0.3 GiB of memory, at most 0.2 can be had'):
        decode(saved(Image.fromarray(np.tile(np.linspace(0, 255, 6000, dtype=np.uint8), (4000, 1))), 'PNG', compress_level=1), 32)


def test_files_that_vanish_while_packing(tmp_path):
    archive = msl(write_marsyard(tmp_path/'yard', n=20, size=32))
    for path in archive.table.path[5:8]: (archive.root/path).unlink()
    assert len(pack_archive(archive, tmp_path/'pack', 32)) == 17
    assert pd.read_csv(tmp_path/'pack'/'quarantine.csv').reason.tolist() == ['FileNotFoundError: No such file or directory']*3


def test_a_folder_that_vanishes_as_a_whole_is_no_quarantine(tmp_path):
    archive = msl(write_marsyard(tmp_path/'yard', n=200, size=32))
    (tmp_path/'yard').rename(tmp_path/'unplugged')
    with expect_fail(OSError, 'has vanished'): pack_archive(archive, tmp_path/'pack', 32)
    (tmp_path/'unplugged').rename(tmp_path/'yard')
    assert len(pack_archive(archive, tmp_path/'pack', 32)) == 200


def as_nobody(function):
    "What the function says when called by a user who may do nothing here; root may do everything"
    if os.geteuid(): return function()
    into, out = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setuid(65534)
            os.write(out, function().encode())
        finally: os._exit(0)  # no copy of pytest goes on
    os.waitpid(pid, 0)
    return os.read(into, 1000).decode()


def test_permissions(tmp_path_factory):
    with_access = Path('/tmp') if not os.geteuid() else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=with_access) as d:
        d = Path(d)
        d.chmod(0o755)
        (d/'in'/'locked').mkdir(parents=True)
        (d/'in'/'a.jpg').write_bytes(saved(Image.new('RGB', (40, 40)), 'JPEG'))
        (d/'in'/'a.jpg').chmod(0)
        assert as_nobody(lambda: read_image(d/'in'/'a.jpg', 32)[2]) == 'PermissionError: Permission denied'
        (d/'in'/'locked').chmod(0)

        def list_it():
            try: return str(find_images(d/'in'))
            except MarsclrError as e: return str(e)
        assert as_nobody(list_it) == f"'{d}/in/locked' cannot be listed (Permission denied): make it readable, or move it away"
        (d/'in'/'locked').chmod(0o755)


def test_what_is_passed_over_is_counted_and_jp2_is_read(tmp_path, capsys):
    image = scene(np.random.default_rng(0))
    (tmp_path/'a'/'.hidden').mkdir(parents=True)
    for name in ('x.jpg', 'y.jp2', '.hidden/z.jpg', 'w.ppm', 'v.jfif'): image.save(tmp_path/'a'/name, {'.jp2': 'JPEG2000', '.ppm': 'PPM'}.get(Path(name).suffix, 'JPEG'))
    image.save(tmp_path/'a'/'noext', 'PNG')
    (tmp_path/'more').mkdir()
    image.save(tmp_path/'more'/'u.png')
    (tmp_path/'a'/'link').symlink_to(tmp_path/'more')
    (tmp_path/'more'/'round').symlink_to(tmp_path/'a')
    marsclr_pack(['folder', str(tmp_path/'plain'), '--root', str(tmp_path/'a'), '--size', '32'])
    said = capsys.readouterr().out.splitlines()
    left = next(o for o in said if o.startswith('left out: '))
    assert left == ('left out: 2 files of other kinds: hidden 1, no suffix 1'
                    '; 1 linked folder (--follow_links reads what is in there)')
    pack = load_pack(tmp_path/'plain')
    assert pack.table.path.tolist() == ['v.jfif', 'w.ppm', 'x.jpg', 'y.jp2']
    assert (pack[range(4)].float() - pack[1].float()).abs().mean() < 4
    marsclr_pack(['folder', str(tmp_path/'all'), '--root', str(tmp_path/'a'), '--size', '32', '--follow_links'])
    assert load_pack(tmp_path/'all').table.path.tolist() == ['link/u.png', 'v.jfif', 'w.ppm', 'x.jpg', 'y.jp2']


def test_a_place_that_cannot_be_written_to_is_said_in_words(tmp_path_factory):
    with_access = Path('/tmp') if not os.geteuid() else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=with_access) as d:
        d = Path(d)
        (d/'in').mkdir()
        Image.new('RGB', (40, 40)).save(d/'in'/'a.jpg')
        d.chmod(0o555)

        def pack_it():
            try: return str(pack_archive(image_folder(d/'in'), d/'new'/'p.pack', 32))
            except MarsclrError as e: return str(e)
        assert as_nobody(pack_it) == f'{d} cannot be written to: give another place for p.pack (by --to, or as the name of the pack or run)'
        d.chmod(0o755)


# --- kills

def pack_slowly(root, to, out):
    "As the command does, but with time to be killed in"
    os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    fast, pack_writer.PackWriter.flush_bytes = reading.decode_pieces, 2**18

    def slow(file, *args):
        time.sleep(.001)
        return fast(file, *args)
    reading.decode_pieces = slow
    marsclr_pack(['msl', str(to), '--root', str(root), '--size', '48', '--workers', '2'])


def contents(folder): return {o.name: o.read_bytes() for o in folder.iterdir()}


def test_killed_four_times_it_ends_as_if_it_had_not_been(tmp_path):
    root, rng = write_marsyard(tmp_path/'yard', n=600, size=64), random.Random(0)
    archive = msl(root)
    for path in archive.table.path[7:600:50]: (archive.root/path).write_bytes(b'')
    pack_archive(archive, tmp_path/'whole', 48)
    to, part, told = tmp_path/'killed', tmp_path/'.killed-partial', tmp_path/'told'
    kept = []
    for _ in range(4):
        process, before = job(pack_slowly, root, to, told), max(kept, default=100)  # the head of the table has less
        while not (part/'table.csv').exists() or (part/'table.csv').stat().st_size <= before:
            assert process.is_alive()
            time.sleep(.002)
        time.sleep(rng.uniform(0, .04))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not to.exists()
        kept.append((part/'table.csv').stat().st_size)
    process = job(pack_slowly, root, to, told)
    process.join(60)
    assert process.exitcode == 0
    assert contents(to) == contents(tmp_path/'whole') and not part.exists()
    going_on = [int(o.split()[3]) for o in told.read_text().split(f'{to}: ')[1:] if o.startswith('going on after')]
    assert len(going_on) == 4 and 0 < going_on[0] < going_on[1] < going_on[2] < going_on[3] < 600


def test_two_at_once_do_not_meet(tmp_path):
    root = write_marsyard(tmp_path/'yard', n=600, size=64)
    first = job(pack_slowly, root, tmp_path/'pack', tmp_path/'told')
    while not (tmp_path/'.pack-partial'/'table.csv').exists():
        assert first.is_alive()
        time.sleep(.002)
    with expect_fail(MarsclrError, 'is in use by another process'): pack_archive(msl(root), tmp_path/'pack', 48)
    first.join(60)
    assert first.exitcode == 0 and len(load_pack(tmp_path/'pack')) == 600


@pytest.mark.parametrize('spoil', ['table.csv', 'quarantine.csv', 'images.npy'])
def test_a_spoiled_rest_is_used_as_far_as_it_is_sound(spoil, tmp_path):
    archive = msl(write_marsyard(tmp_path/'yard', n=60, size=32))
    for path in archive.table.path[::9]: (archive.root/path).write_bytes(b'')
    pack_archive(archive, tmp_path/'whole', 32)
    for cut in (0, 1, 90, 140, 1000, 5000):
        part = tmp_path/'.again-partial'
        part.mkdir()
        for name, data in contents(tmp_path/'whole').items(): (part/name).write_bytes(data[:cut] if name == spoil else data)
        pack_archive(archive, tmp_path/'again', 32)
        assert contents(tmp_path/'again') == contents(tmp_path/'whole')
        for o in (tmp_path/'again').iterdir(): o.unlink()
        (tmp_path/'again').rmdir()


def test_an_archive_that_has_changed_keeps_what_comes_before_the_change(tmp_path, capsys):
    archive = msl(write_marsyard(tmp_path/'yard', n=60, size=32))
    pack_archive(archive, tmp_path/'.new-partial', 32)
    shorter = archive.where(np.arange(60) != 40)
    assert len(pack_archive(shorter, tmp_path/'new', 32)) == 59
    assert 'going on after 40 of 59 images' in capsys.readouterr().out
    pack_archive(shorter, tmp_path/'straight', 32)
    assert contents(tmp_path/'new') == contents(tmp_path/'straight')
