"""python -m tiny_diffusion COMMAND"""

import sys

from tiny_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
