"""Programs that measure the method: `python -m experiments.NAME --help`. They import t1; t1 imports none of them."""
