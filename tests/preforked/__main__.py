"""`python -m preforked SOCKET MODULE ARGUMENTS…`: the module as a program, its local Ray instance with preforked workers."""

import runpy
import sys
from pathlib import Path

from preforked import preforked

_, socket, module, *arguments = sys.argv
sys.argv[:] = [module, *arguments]
with preforked(Path(socket)) as end:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        end()
