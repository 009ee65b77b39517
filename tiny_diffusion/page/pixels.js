// Bytes and grey levels, for the worker and the page.

// The bytes of a base64 text.
function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// A value of an image in [-1, 1] as a grey level from 0 to 255, as data/pixels.py does.
const greyLevel = (value) => rounded((Math.min(Math.max(value, -1), 1) + 1) * 127.5);

// Images (N, C, H, W) of a base64 text of bytes, as one Float32Array in [-1, 1] each.
function imagesOf(base64, { channels, height, width }) {
  const bytes = bytesOf(base64), size = channels * height * width;
  return Array.from({ length: bytes.length / size },
    (_, i) => Float32Array.from(bytes.subarray(i * size, (i + 1) * size), (value) => value / 127.5 - 1));
}
