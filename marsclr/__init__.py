__version__ = "0.1.0"

import sys
import warnings

if sys.platform == 'win32':
    raise ImportError('marsclr runs on Linux and macOS: on Windows, use it in the Windows Subsystem for Linux (WSL)')

# fastai and timm call torch.jit at every import; a user of marsclr can do nothing about it
warnings.filterwarnings('ignore', r'`torch\.jit\.\w+` is deprecated', FutureWarning)
