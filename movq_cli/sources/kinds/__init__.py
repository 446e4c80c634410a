"""One file for each kind of source; `movq_cli.sources.open` imports all of them."""
