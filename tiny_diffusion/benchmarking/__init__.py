"""How fast: rates.py measures the machine, speed.py training and sampling, profile.py the parts of a training step."""
