"""One self-contained HTML file of a run, in which its model runs: see build.py."""
