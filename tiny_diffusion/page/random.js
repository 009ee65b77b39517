// The random numbers of sample.py: image i of a seed starts from the same noise in the page.
//
// tiny_diffusion/randomness.py makes numpy's generator Philox from a SeedSequence of (seed, purpose, index), and draws
// 32-bit normal numbers by the ziggurat method.  All three are here as numpy has them; a test compares the numbers.

const PURPOSES = { image: 7, figure: 9 }; // rows of PURPOSES in randomness.py

// A pool of four words from seed and spawn key, as numpy.random.SeedSequence; returns two 64-bit words.
function philoxKey(seed, purpose, index) {
  const words = [];
  for (let rest = BigInt(seed); words.length === 0 || rest > 0n; rest >>= 32n) words.push(Number(rest & 0xffffffffn));
  while (words.length < 4) words.push(0);
  words.push(PURPOSES[purpose], index);
  let constant = 0x43b0d7e5;
  const hash = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return (value ^ (value >>> 16)) >>> 0;
  };
  const mix = (x, y) => {
    const mixed = (Math.imul(0xca01f9dd, x) - Math.imul(0x4973f715, y)) | 0;
    return (mixed ^ (mixed >>> 16)) >>> 0;
  };
  const pool = words.slice(0, 4).map(hash);
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) if (from !== to) pool[to] = mix(pool[to], hash(pool[from]));
  }
  for (const word of words.slice(4)) for (let to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(word));
  let constantOut = 0x8b51f9dd;
  const state = pool.map((word) => {
    word ^= constantOut;
    constantOut = Math.imul(constantOut, 0x58f38ded);
    word = Math.imul(word, constantOut);
    return BigInt((word ^ (word >>> 16)) >>> 0);
  });
  return [state[0] | (state[1] << 32n), state[2] | (state[3] << 32n)];
}

const WORD = 0xffffffffffffffffn;

// Philox 4x64 with ten rounds: Salmon et al. (2011).  Four 64-bit words from a counter and a key.
function philox(counter, [key0, key1]) {
  let [c0, c1, c2, c3] = [counter, 0n, 0n, 0n];
  for (let round = 0; round < 10; round++) {
    const product0 = 0xd2e7470ee14c6c93n * c0, product1 = 0xca5a826395121157n * c2;
    [c0, c1, c2, c3] = [(product1 >> 64n) ^ c1 ^ key0, product1 & WORD, (product0 >> 64n) ^ c3 ^ key1, product0 & WORD];
    key0 = (key0 + 0x9e3779b97f4a7c15n) & WORD;
    key1 = (key1 + 0xbb67ae8584caa73bn) & WORD;
  }
  return [c0, c1, c2, c3];
}

// The tables of the ziggurat for 32-bit normal numbers: 256 layers of equal area, as numpy's wi, ki and fi.
const ZIGGURAT_END = 3.6541528853610088;
const ZIGGURAT = (() => {
  const area = 0.00492867323399, steps = 2 ** 23;
  const density = (x) => Math.exp(-0.5 * x * x);
  const widths = new Float32Array(256), inside = new Uint32Array(256), heights = new Float32Array(256);
  let x = ZIGGURAT_END;
  const base = area / density(x);
  inside[0] = (x / base) * steps;
  widths[0] = base / steps;
  widths[255] = x / steps;
  heights[0] = 1;
  heights[255] = density(x);
  for (let layer = 254; layer >= 1; layer--) {
    const above = Math.sqrt(-2 * Math.log(area / x + density(x)));
    inside[layer + 1] = (above / x) * steps;
    x = above;
    heights[layer] = density(x);
    widths[layer] = x / steps;
  }
  return { widths, inside, heights };
})();

// stream(seed, purpose, index) of randomness.py: an endless row of numbers.
class Stream {
  constructor(seed, purpose, index = 0) {
    this.key = philoxKey(seed, purpose, index);
    this.counter = 0n;
    this.words = []; // 32-bit words that are left of the last block, the next one last
  }

  word() {
    if (!this.words.length) {
      this.counter += 1n;
      for (const value of philox(this.counter, this.key).reverse()) {
        this.words.push(Number(value >> 32n), Number(value & 0xffffffffn));
      }
    }
    return this.words.pop();
  }

  uniform() {
    return (this.word() >>> 8) / 2 ** 24;
  }

  normal() {
    const { widths, inside, heights } = ZIGGURAT;
    for (;;) {
      const word = this.word();
      const layer = word & 255;
      const size = word >>> 9;
      const x = Math.fround(size * widths[layer]) * (word & 256 ? -1 : 1);
      if (size < inside[layer]) return x;
      if (layer === 0) {
        const tail = this.tail();
        return (size >>> 8) & 1 ? -tail : tail;
      }
      // Rounded to 32 bits as numpy does: another decision here would shift all numbers that follow.
      const step = Math.fround(heights[layer - 1] - heights[layer]);
      const height = Math.fround(Math.fround(step * this.uniform()) + heights[layer]);
      if (height < Math.exp(-0.5 * x * x)) return x;
    }
  }

  // A number beyond the last layer.
  tail() {
    for (;;) {
      const x = Math.fround(Math.fround(1 / ZIGGURAT_END) * -Math.fround(Math.log1p(-this.uniform())));
      const y = -Math.fround(Math.log1p(-this.uniform()));
      if (y + y > Math.fround(x * x)) return Math.fround(ZIGGURAT_END + x);
    }
  }

  normals(count) {
    return Float32Array.from({ length: count }, () => this.normal());
  }
}
