"""Train a diffusion model.

python train.py --dataset digits --output_dir outputs/digits        # a minute or two, no download
python train.py --dataset mnist --minutes 10 --output_dir outputs/mnist
python train.py --help
"""

import sys

from tiny_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
