"""`python -m storebackends` is the command line."""

from .cli import main

main()
