"""`python -m qlora_phi3`."""

from .cli import main

if __name__ == "__main__":
    main()
