"""The networks: UNet(x, time, label) -> output, in unet.py, built from the parts in layers.py."""
