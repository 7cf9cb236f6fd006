"""`python -m qlora_phi3`, and the `qlora-phi3` that an installation makes."""

from __future__ import annotations

from . import installed


def main() -> None:
    """One command, from start to the end of the process."""
    try:
        installed.check_python()
        from . import cli

        cli.main(to_the_end=True)
    except (ImportError, MemoryError) as error:
        installed.stop(error)
    except KeyboardInterrupt as stop:  # before the commands were there
        raise SystemExit(getattr(stop, "exit_code", 130)) from None


if __name__ == "__main__":
    main()
