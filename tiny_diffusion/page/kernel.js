// The memory of a network and the one product that everything costly is made of.
//
// All numbers lie in one array of floats, which grows.  With WebAssembly it is the memory that kernel.wasm works in;
// without, a plain Float32Array.  Addresses count floats.  Nothing here knows what the numbers mean.

const TILE_CHANNELS = 8; // of kernel.wat
const ROOM = 1 << 15; // floats behind all that is in use, which tiles at an edge may read

class Memory {
  // kernel: the bytes of kernel.wasm, or null for plain JavaScript.
  constructor(kernel) {
    this.used = 0;
    this.products = 0; // multiplications so far, for the page to tell
    this.multiply = this.multiplyPlain;
    if (kernel) {
      this.wasm = new WebAssembly.Memory({ initial: 16 });
      const instance = new WebAssembly.Instance(new WebAssembly.Module(kernel), { page: { memory: this.wasm } });
      this.kernel = instance.exports.multiply;
      this.multiply = this.multiplyWasm;
      this.floats = new Float32Array(this.wasm.buffer);
    } else {
      this.floats = new Float32Array(1 << 18);
    }
  }

  // Room for this many floats, which keep what was there before.  Returns the address.
  allocate(count) {
    const at = this.used;
    this.used = (at + count + 3) & ~3; // whole vectors
    const missing = this.used + ROOM - this.floats.length;
    if (missing > 0 && this.wasm) {
      this.wasm.grow(Math.ceil(Math.max(missing, this.floats.length / 2) / 16384)); // a page is 16384 floats
      this.floats = new Float32Array(this.wasm.buffer);
    } else if (missing > 0) {
      const larger = new Float32Array(this.floats.length + Math.max(missing, this.floats.length / 2));
      larger.set(this.floats);
      this.floats = larger;
    }
    return at;
  }

  // Room for the output of `multiply`, with that for the tile that it writes last.
  allocateOutput(pixels, width) {
    return this.allocate((pixels + 4) * width + TILE_CHANNELS);
  }

  // Gives back all that was allocated since `used` was this.
  release(used) {
    this.used = used;
  }

  store(values) {
    const at = this.allocate(values.length);
    this.floats.set(values, at);
    return at;
  }

  // A matrix of `inputs` x `width` as `multiply` reads it: blocks of 8 columns, padded with zeros, and in each block
  // row after row.  weight: (input, output) -> number.
  pack(inputs, width, weight) {
    const blocks = Math.ceil(width / TILE_CHANNELS);
    const at = this.allocate(blocks * inputs * TILE_CHANNELS);
    const floats = this.floats;
    for (let block = 0, to = at; block < blocks; block++) {
      for (let input = 0; input < inputs; input++) {
        for (let output = block * TILE_CHANNELS; output < (block + 1) * TILE_CHANNELS; output++) {
          floats[to++] = output < width ? weight(input, output) : 0;
        }
      }
    }
    return at;
  }

  packBias(values, width) {
    const padded = new Float32Array(Math.ceil(width / TILE_CHANNELS) * TILE_CHANNELS);
    if (values) padded.set(values);
    return this.store(padded);
  }

  // out[row, column, :] = bias + sum over segments s and inputs k < length of
  //   memory[input + row * rowStep + column * columnStep + s * segmentStep + k] * weights[s * length + k, :]
  //
  // A matrix product has one segment and one row.  A 3x3 convolution of an image with channels last and a border of
  // zeros has three segments, one for each row of its window, of three pixels each.
  multiplyWasm(input, rows, columns, rowStep, columnStep, segments, length, segmentStep, weights, bias, width, out) {
    this.products += rows * columns * segments * length * width;
    this.kernel(4 * input, rows, columns, 4 * rowStep, 4 * columnStep, segments, length, 4 * segmentStep,
      4 * weights, 4 * bias, width, 4 * out);
  }

  multiplyPlain(input, rows, columns, rowStep, columnStep, segments, length, segmentStep, weights, bias, width, out) {
    this.products += rows * columns * segments * length * width;
    const f = this.floats;
    const blockSize = segments * length * TILE_CHANNELS;
    for (let block = 0; block * TILE_CHANNELS < width; block++) {
      const kept = Math.min(TILE_CHANNELS, width - block * TILE_CHANNELS);
      const first = bias + block * TILE_CHANNELS;
      for (let pixel = 0; pixel < rows * columns; pixel++) {
        let at = input + Math.floor(pixel / columns) * rowStep + (pixel % columns) * columnStep;
        let w = weights + block * blockSize;
        let c0 = f[first], c1 = f[first + 1], c2 = f[first + 2], c3 = f[first + 3];
        let c4 = f[first + 4], c5 = f[first + 5], c6 = f[first + 6], c7 = f[first + 7];
        for (let segment = 0; segment < segments; segment++, at += segmentStep) {
          for (let k = at; k < at + length; k++, w += TILE_CHANNELS) {
            const x = f[k];
            c0 += x * f[w];
            c1 += x * f[w + 1];
            c2 += x * f[w + 2];
            c3 += x * f[w + 3];
            c4 += x * f[w + 4];
            c5 += x * f[w + 5];
            c6 += x * f[w + 6];
            c7 += x * f[w + 7];
          }
        }
        const to = out + pixel * width + block * TILE_CHANNELS;
        f[to] = c0;
        if (kept > 1) f[to + 1] = c1;
        if (kept > 2) f[to + 2] = c2;
        if (kept > 3) f[to + 3] = c3;
        if (kept > 4) f[to + 4] = c4;
        if (kept > 5) f[to + 5] = c5;
        if (kept > 6) f[to + 6] = c6;
        if (kept > 7) f[to + 7] = c7;
      }
    }
  }
}
