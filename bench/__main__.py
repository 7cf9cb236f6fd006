"""`python -m bench CASE`: measure, print, and append to bench/results/<machine>/CASE.jsonl.

`python -m bench report` measures nothing: it makes tables of what is there.
"""

from __future__ import annotations

import argparse
import sys

from qlora_phi3 import installed

installed.check_python()
try:
    from . import compare, context, data, engine, gpu, kernels, merge, quality, quickstart, report, startup
except ImportError as error:
    installed.stop(error)

CASES = {
    "compare": compare,
    "context": context,
    "data": data,
    "engine": engine,
    "gpu": gpu,
    "kernels": kernels,
    "merge": merge,
    "quality": quality,
    "quickstart": quickstart,
    "report": report,
    "startup": startup,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="case", required=True)
    for name, case in CASES.items():
        case.options(commands.add_parser(name, help=(case.__doc__ or "").splitlines()[0]))
    chosen = parser.parse_args(arguments)
    return CASES[chosen.case].run(chosen)


if __name__ == "__main__":
    sys.exit(main())
