"""How fast it is: rates.py of the machine, speed.py of training and sampling, profile.py of the parts of a step."""
