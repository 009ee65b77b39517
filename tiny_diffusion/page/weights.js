// The weights of a network as the page carries them: 16-bit whole numbers, with a scale for each row of a tensor.

// network: as weights.py makes it.  Returns name -> {shape, values}, values being a Float32Array.
function readWeights(network) {
  const numbers = new DataView(bytesOf(network.weights).buffer);
  const scales = new DataView(bytesOf(network.scales).buffer);
  const weights = new Map();
  let at = 0, row = 0;
  for (const [name, shape] of network.tensors) {
    const values = new Float32Array(shape.reduce((product, side) => product * side, 1));
    const rows = shape.length > 1 ? shape[0] : 1; // a vector is one row
    const length = values.length / rows;
    for (let i = 0; i < values.length; i++, at += 2) {
      values[i] = numbers.getInt16(at, true) * scales.getFloat32(4 * (row + Math.floor(i / length)), true);
    }
    row += rows;
    weights.set(name, { shape, values });
  }
  return weights;
}
