"""How fast it is: rates.py of the machine, measure.py of training and sampling, profile.py of a step's parts."""
