"""Show how noise covers images, or the noise schedules side by side.

python visualize_diffusion.py --dataset digits --num_images 6 --save_path outputs/forward_diffusion.png
python visualize_diffusion.py --what schedules
python visualize_diffusion.py --help
"""

import sys

from tiny_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["visualize", *sys.argv[1:]]))
