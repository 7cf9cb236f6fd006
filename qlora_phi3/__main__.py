"""`python -m qlora_phi3`."""

from __future__ import annotations

from . import installed

if __name__ == "__main__":
    installed.check_python()
    try:
        from .cli import main

        main()
    except (ImportError, MemoryError) as error:
        installed.stop(error)
    except KeyboardInterrupt:  # before the commands were there
        raise SystemExit(130) from None
