// The U-Net of tiny_diffusion/models/unet.py: (noisy image, time, label) -> an image of the same shape.
//
// It computes what UNet.forward computes, block for block and under the same names of weights, for one image at a time.
// Images inside are tensors {at, height, width, channels} in a Memory, with channels last; those that a 3x3 convolution
// reads have a border of zeros one pixel wide.  Products are those of kernel.js, everything else is here.

const EPSILON = 1e-5; // of torch's group norm
const silu = (x) => x / (1 + Math.exp(-x));
const ACTIVATIONS = {
  silu,
  relu: (x) => (x > 0 ? x : 0),
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  mish: (x) => x * Math.tanh(x > 20 ? x : Math.log1p(Math.exp(x))),
};
const ROWS_OF_SCORES = 256; // pixels whose attention is computed at a time

class UNet {
  // shape: what build.py says of the network.   weights: name -> {shape, values}.   memory: of kernel.js.
  constructor(shape, weights, memory) {
    this.shape = shape;
    this.memory = memory;
    this.weights = weights;
    this.activation = ACTIVATIONS[shape.activation];
    this.layers = new Map();
    for (const [name, { shape: size, values }] of weights) {
      const layer = name.slice(0, name.lastIndexOf("."));
      if (!name.endsWith(".weight")) continue;
      const bias = weights.get(`${layer}.bias`)?.values;
      if (size.length === 4) this.layers.set(layer, this.convolution(size, values, bias));
      else if (size.length === 2 && layer !== "class_embedding") this.layers.set(layer, this.linear([layer]));
      else if (size.length === 1) this.layers.set(layer, { scale: values, shift: bias });
      if (layer.endsWith(".to_q")) {
        const attention = layer.slice(0, -".to_q".length);
        this.layers.set(`${attention}.to_qkv`, this.linear(["q", "k", "v"].map((part) => `${attention}.to_${part}`)));
      }
    }
    this.noBias = memory.packBias(null, 4096);
  }

  // A convolution with torch's weight (outputs, inputs, 3, 3) or (outputs, inputs, 1, 1).
  convolution([outputs, inputs, side], values, bias) {
    const taps = side * side;
    const weight = (k, output) => values[(output * inputs + (k % inputs)) * taps + Math.floor(k / inputs)];
    const { memory } = this;
    return { outputs, weights: memory.pack(inputs * taps, outputs, weight), bias: memory.packBias(bias, outputs) };
  }

  // Linear maps of the same input, their outputs one after another.
  linear(names) {
    const parts = names.map((name) => ({ ...this.weights.get(`${name}.weight`), bias: this.weights.get(`${name}.bias`).values }));
    const [each, inputs] = parts[0].shape;
    const outputs = each * parts.length;
    const weight = (k, output) => parts[Math.floor(output / each)].values[(output % each) * inputs + k];
    const bias = Float32Array.from({ length: outputs }, (_, output) => parts[Math.floor(output / each)].bias[output % each]);
    return { outputs, weights: this.memory.pack(inputs, outputs, weight), bias: this.memory.packBias(bias, outputs) };
  }

  // The output for one image.  x: Float32Array (C, H, W).   time: real.   label: whole, or null for the null class.
  evaluate(x, time, label) {
    const { memory, shape } = this;
    const used = memory.used;
    const embedding = this.embed(time, label);
    let h = this.conv3(this.patches(x), "conv_in");
    const skips = [h];
    shape.widths.forEach((_, level) => {
      for (let i = 0; i < shape.layers_per_block; i++) {
        h = this.residual(h, `down_blocks.${level}`, i, embedding);
        skips.push(h);
      }
      if (level < shape.widths.length - 1) {
        h = this.conv3(this.padded(h), `down_blocks.${level}.downsamplers.0.conv`, 2);
        skips.push(h);
      }
    });
    h = this.residual(h, "mid_block", 0, embedding);
    h = this.residual(h, "mid_block", 1, embedding);
    shape.widths.forEach((_, block) => {
      for (let i = 0; i <= shape.layers_per_block; i++) {
        h = this.residual(this.joined(h, skips.pop()), `up_blocks.${block}`, i, embedding);
      }
      if (block < shape.widths.length - 1) {
        const { height, width } = skips[skips.length - 1];
        h = this.conv3(this.enlarged(h, height, width), `up_blocks.${block}.upsamplers.0.conv`);
      }
    });
    const out = this.image(this.conv3(this.normed(h, "conv_norm_out", null, silu), "conv_out"));
    memory.release(used);
    return out;
  }

  // Time and label as one vector, activated.  Returns its address.
  embed(time, label) {
    const { memory, shape } = this;
    const half = shape.widths[0] / 2;
    const sinusoids = new Float32Array(2 * half);
    for (let i = 0; i < half; i++) {
      const angle = time * Math.fround(Math.exp((-Math.log(10000) * i) / half));
      sinusoids[i] = Math.cos(angle);
      sinusoids[half + i] = Math.sin(angle);
    }
    const hidden = this.vector(memory.store(sinusoids), "time_embedding.linear_1");
    this.activate(hidden, shape.embedding_width, silu);
    const embedding = this.vector(hidden, "time_embedding.linear_2");
    if (shape.num_classes) {
      const row = (label ?? shape.num_classes) * shape.embedding_width;
      const classes = this.weights.get("class_embedding.weight").values;
      for (let i = 0; i < shape.embedding_width; i++) memory.floats[embedding + i] += classes[row + i];
    }
    this.activate(embedding, shape.embedding_width, this.activation);
    return embedding;
  }

  // A linear map of one vector.
  vector(at, name) {
    const inputs = this.weights.get(`${name}.weight`).shape[1];
    return this.pixels({ at, height: 1, width: 1, channels: inputs }, name).at;
  }

  // A linear map of the channels of each pixel.
  pixels({ at, height, width, channels }, name) {
    const { memory } = this;
    const layer = this.layers.get(name);
    const out = memory.allocateOutput(height * width, layer.outputs);
    memory.multiply(at, 1, height * width, 0, channels, 1, channels, 0, layer.weights, layer.bias, layer.outputs, out);
    return { at: out, height, width, channels: layer.outputs };
  }

  // A 3x3 convolution of a tensor with a border, whose height and width are those without it.
  conv3({ at, height, width, channels }, name, stride = 1) {
    const { memory } = this;
    const layer = this.layers.get(name);
    const rows = Math.ceil(height / stride);
    const columns = Math.ceil(width / stride);
    const out = memory.allocateOutput(rows * columns, layer.outputs);
    const row = (width + 2) * channels;
    memory.multiply(at, rows, columns, stride * row, stride * channels, 3, 3 * channels, row, layer.weights, layer.bias,
      layer.outputs, out);
    return { at: out, height: rows, width: columns, channels: layer.outputs };
  }

  // A residual block and its attention, if it has one.
  residual(x, block, i, embedding) {
    const { memory } = this;
    const name = `${block}.resnets.${i}`;
    const projected = this.vector(embedding, `${name}.time_emb_proj`);
    const h = this.conv3(this.normed(x, `${name}.norm1`, null, this.activation), `${name}.conv1`);
    const out = this.conv3(this.normed(h, `${name}.norm2`, projected, this.activation), `${name}.conv2`);
    const shortcut = this.layers.has(`${name}.conv_shortcut`) ? this.pixels(x, `${name}.conv_shortcut`) : x;
    const f = memory.floats;
    for (let k = 0, end = out.height * out.width * out.channels; k < end; k++) f[out.at + k] += f[shortcut.at + k];
    return this.layers.has(`${block}.attentions.${i}.to_q`) ? this.attention(out, `${block}.attentions.${i}`) : out;
  }

  // Self-attention between all pixels, added to its input.
  attention(x, name) {
    const { memory, shape } = this;
    const { height, width, channels } = x;
    const pixels = height * width;
    const depth = shape.head_width;
    const qkv = this.pixels(this.normed(x, `${name}.group_norm`, null, null), `${name}.to_qkv`).at;
    const mixed = { at: memory.allocate(pixels * channels), height, width, channels };
    const used = memory.used;
    for (let head = 0; head < channels; head += depth) {
      const f = memory.floats;
      const keys = memory.pack(depth, pixels, (k, pixel) => f[qkv + pixel * 3 * channels + channels + head + k]);
      const values = memory.pack(pixels, depth, (pixel, k) => f[qkv + pixel * 3 * channels + 2 * channels + head + k]);
      const zeros = memory.packBias(null, pixels);
      const scores = memory.allocateOutput(Math.min(ROWS_OF_SCORES, pixels), pixels);
      const out = memory.allocateOutput(Math.min(ROWS_OF_SCORES, pixels), depth);
      for (let first = 0; first < pixels; first += ROWS_OF_SCORES) {
        const rows = Math.min(ROWS_OF_SCORES, pixels - first);
        const queries = qkv + first * 3 * channels + head;
        memory.multiply(queries, 1, rows, 0, 3 * channels, 1, depth, 0, keys, zeros, pixels, scores);
        this.softmax(scores, rows, pixels, 1 / Math.sqrt(depth));
        memory.multiply(scores, 1, rows, 0, pixels, 1, pixels, 0, values, zeros, depth, out);
        for (let row = 0; row < rows; row++) {
          const from = out + row * depth;
          memory.floats.copyWithin(mixed.at + (first + row) * channels + head, from, from + depth);
        }
      }
      memory.release(used);
    }
    const added = this.pixels(mixed, `${name}.to_out.0`);
    for (let k = 0; k < pixels * channels; k++) memory.floats[added.at + k] += memory.floats[x.at + k];
    return added;
  }

  softmax(at, rows, columns, scale) {
    const f = this.memory.floats;
    for (let row = 0; row < rows; row++, at += columns) {
      let largest = -Infinity;
      for (let k = at; k < at + columns; k++) largest = Math.max(largest, f[k]);
      let total = 0;
      for (let k = at; k < at + columns; k++) total += f[k] = Math.exp((f[k] - largest) * scale);
      for (let k = at; k < at + columns; k++) f[k] /= total;
    }
  }

  activate(at, count, activation) {
    const f = this.memory.floats;
    for (let k = at; k < at + count; k++) f[k] = activation(f[k]);
  }

  // The group norm of a tensor.  projected: the address of a scale and a shift for each channel, or null.
  // activation: of its values, which a 3x3 convolution will read, so that they get a border; null for neither.
  normed(x, name, projected, activation) {
    const { memory } = this;
    const { height, width, channels } = x;
    const { scale, shift } = this.channelScales(x, this.layers.get(name), projected);
    const out = activation ? this.bordered(height, width, channels)
      : { at: memory.allocate(height * width * channels), height, width, channels };
    const f = memory.floats;
    const border = activation ? 1 : 0;
    let from = x.at;
    for (let row = 0; row < height; row++) {
      let to = out.at + ((row + border) * (width + 2 * border) + border) * channels;
      for (let column = 0; column < width; column++) {
        for (let channel = 0; channel < channels; channel++) {
          const value = f[from++] * scale[channel] + shift[channel];
          f[to++] = activation ? activation(value) : value;
        }
      }
    }
    return out;
  }

  // What each channel is multiplied by and what is added, so that its group has mean 0 and variance 1 before `layer`.
  channelScales({ at, height, width, channels }, layer, projected) {
    const f = this.memory.floats;
    const { groups } = this.shape;
    const sums = new Float64Array(channels);
    const squares = new Float64Array(channels);
    for (let pixel = 0, k = at; pixel < height * width; pixel++) {
      for (let channel = 0; channel < channels; channel++, k++) {
        sums[channel] += f[k];
        squares[channel] += f[k] * f[k];
      }
    }
    const each = channels / groups;
    const count = each * height * width;
    const scale = new Float32Array(channels);
    const shift = new Float32Array(channels);
    for (let first = 0; first < channels; first += each) {
      let mean = 0, square = 0;
      for (let channel = first; channel < first + each; channel++) {
        mean += sums[channel] / count;
        square += squares[channel] / count;
      }
      const rate = 1 / Math.sqrt(Math.max(square - mean * mean, 0) + EPSILON);
      for (let channel = first; channel < first + each; channel++) {
        const more = projected === null ? 1 : 1 + f[projected + channel];
        scale[channel] = layer.scale[channel] * rate * more;
        shift[channel] = (layer.shift[channel] - mean * rate * layer.scale[channel]) * more;
        if (projected !== null) shift[channel] += f[projected + channels + channel];
      }
    }
    return { scale, shift };
  }
}
