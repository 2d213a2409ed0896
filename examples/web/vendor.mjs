// Copy what the page loads out of node_modules, so that this folder alone is the site.
import { copyFileSync, mkdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = dirname(fileURLToPath(import.meta.url));
const files = [
  '@huggingface/transformers/dist/transformers.min.js', // with onnxruntime-web in it
  'onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs',
  'onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm',
];
mkdirSync(join(here, 'vendor'), { recursive: true });
for (const file of files) {
  copyFileSync(join(here, 'node_modules', file), join(here, 'vendor', file.split('/').at(-1)));
}
