"""Sample images from a trained model.

python sample.py --checkpoint outputs/digits/model_final.pt
python sample.py --checkpoint outputs/digits/model_final.pt --output outputs/digits/denoising.gif
python sample.py --help
"""

import sys

from tiny_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
