"""`python -m hlwq_convert` is `hlwq-convert`."""

from .cli.convert import main

main()
