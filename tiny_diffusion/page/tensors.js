// Moving pixels between images and the tensors of network.js: patches, borders, skips, enlargement.

Object.assign(UNet.prototype, {
  // A tensor of zeros with a border.
  bordered(height, width, channels) {
    const count = (height + 2) * (width + 2) * channels;
    const at = this.memory.allocate(count);
    this.memory.floats.fill(0, at, at + count);
    return { at, height, width, channels };
  },

  // The same tensor with a border.
  padded(x) {
    return this.enlarged(x, x.height, x.width);
  },

  // The nearest pixels of x at another size, which is x's or twice that or one less than twice, with a border.
  enlarged(x, height, width) {
    const out = this.bordered(height, width, x.channels);
    const f = this.memory.floats;
    const rowStep = height === x.height ? 1 : 2;
    const columnStep = width === x.width ? 1 : 2;
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const pixel = Math.floor(row / rowStep) * x.width + Math.floor(column / columnStep);
        const from = x.at + pixel * x.channels;
        f.copyWithin(out.at + ((row + 1) * (width + 2) + column + 1) * x.channels, from, from + x.channels);
      }
    }
    return out;
  },

  // Two tensors of one size with their channels one after the other.
  joined(x, skip) {
    const channels = x.channels + skip.channels;
    const at = this.memory.allocate(x.height * x.width * channels);
    const f = this.memory.floats;
    for (let pixel = 0; pixel < x.height * x.width; pixel++) {
      const from = x.at + pixel * x.channels, other = skip.at + pixel * skip.channels;
      f.copyWithin(at + pixel * channels, from, from + x.channels);
      f.copyWithin(at + pixel * channels + x.channels, other, other + skip.channels);
    }
    return { at, height: x.height, width: x.width, channels };
  },

  // An image (C, H, W) in patches, with a border: torch's pixel_unshuffle.
  patches(x) {
    const { channels, height, width, patch_size: p } = this.shape;
    const out = this.bordered(height / p, width / p, channels * p * p);
    this.eachPixel(out.width + 2, out.channels, 1, (image, at) => { this.memory.floats[out.at + at] = x[image]; });
    return out;
  },

  // The inverse: a tensor of patches as an image (C, H, W).
  image(h) {
    const { channels, height, width } = this.shape;
    const x = new Float32Array(channels * height * width);
    this.eachPixel(h.width, h.channels, 0, (image, at) => { x[image] = this.memory.floats[h.at + at]; });
    return x;
  },

  // Calls with the index of each value in the image (C, H, W), and in the tensor of its patches.
  eachPixel(rowLength, patchChannels, border, call) {
    const { channels, height, width, patch_size: p } = this.shape;
    let image = 0;
    for (let channel = 0; channel < channels; channel++) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          const pixel = (Math.floor(y / p) + border) * rowLength + Math.floor(x / p) + border;
          call(image++, pixel * patchChannels + channel * p * p + (y % p) * p + (x % p));
        }
      }
    }
  },
});

// The error function to 2e-7: Abramowitz & Stegun, 7.1.26.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}
